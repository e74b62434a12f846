"""A frame that torch.compile really traces."""

from collections.abc import Callable
from typing import Any

from torch import nn


def traced_call(module: nn.Module) -> Callable[..., Any]:
    """A function that calls ``module``, hooks included, to be given to ``torch.compile``.

    ``nn.Module.compile`` gives torch a frame of its own file, which dynamo never traces: it goes on to the frames that
    are called from there, of which those in ``torch.nn`` are left alone as well. An ``nn.Sequential`` or an
    ``nn.TransformerEncoderLayer`` is then not compiled at all, without a word
    (torch 2.13, ``torch/_dynamo/eval_frame.py``, where the frame named ``_call_impl`` is exempt from being wrapped).
    """
    traced: Any = module

    def call(*args: Any, **kwargs: Any) -> Any:
        return traced._call_impl(*args, **kwargs)

    return call

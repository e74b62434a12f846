"""torch's own compiler under a key: code compiled under one key is never run under another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Inductor:
    """A backend for ``torch.compile``. torch keeps compiled code by function and by equality of backends.

    What a compiled graph froze and does not check again, such as the choice of an attention kernel, can then not
    outlive the change that made it.

    Attributes:
        key: Any text.
    """

    key: str

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph as ``backend="inductor"`` does."""
        from torch._inductor.compile_fx import compile_fx

        # torch's caches of compiled code on disk know nothing of the key either.
        settings: Any = torch.compiler.config
        with settings.patch(cache_key_tag=f"{settings.cache_key_tag}{self.key}"):
            return compile_fx(graph, list(inputs))  # type: ignore[return-value,unused-ignore]

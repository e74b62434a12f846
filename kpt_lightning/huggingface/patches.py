"""What the launcher changes in Accelerate, so that a script that knows nothing of us is served; all of it restored.

Private to Accelerate is nothing of this: ``Accelerator.__init__``, ``prepare`` and ``prepare_model`` are documented.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kpt_lightning.huggingface.session import Session
from kpt_lightning.optional import ACCELERATE


@contextmanager
def patched(session: Session) -> Iterator[None]:
    """While the block runs, each Accelerator of this process converts its models by ``session``.

    A method that the script replaced meanwhile stays as the script left it.

    Raises:
        MissingDependencyError: Where Accelerate is absent.
    """
    ACCELERATE.require("kpt_lightning.launch")
    from accelerate import Accelerator

    wrappers: dict[str, Callable[[Any], Any]] = {
        "__init__": lambda original: _init(original, session),
        "prepare": lambda original: _prepare(original, session),
        "prepare_model": lambda original: _prepare_model(original, session),
    }
    with ExitStack() as undo:
        for name, wrap in wrappers.items():
            undo.callback(_replace(Accelerator, name, wrap))
        yield


def _replace(owner: type, name: str, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Put a wrapper in the place of a method; the result puts the method back."""
    original = vars(owner)[name]
    ours = functools.wraps(original)(wrap(original))
    setattr(owner, name, ours)

    def back() -> None:
        if vars(owner).get(name) is ours:
            setattr(owner, name, original)

    return back


def _init(original: Any, session: Session) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        session.check(self.state)

    return __init__


def _prepare(original: Any, session: Session) -> Any:
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        session.convert(self.state, args, place=self.device_placement)
        return original(self, *args, **kwargs)

    return prepare


def _prepare_model(original: Any, session: Session) -> Any:
    def prepare_model(
        self: Any, model: Any, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        if not evaluation_mode:
            session.convert(self.state, [model], place=self.device_placement)
        return original(self, model, device_placement, evaluation_mode)

    return prepare_model

"""What the launcher changes in Accelerate, so that a script that knows nothing of us is served; all of it restored.

The methods of Accelerator are documented ones. ``Trainer._save_checkpoint`` is private to transformers: no public way
leads to the folder before it is named.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kpt_lightning.huggingface.checkpoint import atomic_save_state, checked_load_state
from kpt_lightning.huggingface.integration import register_integration
from kpt_lightning.huggingface.session import Session
from kpt_lightning.optional import ACCELERATE

Wrapped = Callable[[Any], Any]


@contextmanager
def patched(session: Session) -> Iterator[None]:
    """While the block runs, each Accelerator of this process converts its models by ``session``.

    ``save_state`` and the Trainer's checkpoints are atomic, and ``--report_to kpt`` (``log_with="kpt"``) keeps a
    history of runs. A method that the script replaced meanwhile stays as the script left it.

    Raises:
        MissingDependencyError: Where Accelerate is absent.
    """
    ACCELERATE.require("kpt_lightning.launch")
    from accelerate import Accelerator

    with ExitStack() as undo:
        undo.enter_context(register_integration(plan=lambda: session.plans[-1] if session.plans else None))
        trainer = functools.cache(lambda: _patch_trainer(session, undo))
        undo.callback(_replace(Accelerator, "__init__", lambda original: _init(original, session, trainer)))
        for name, wrap in _METHODS.items():
            undo.callback(_replace(Accelerator, name, functools.partial(wrap, session)))
        yield


def _replace(owner: type, name: str, wrap: Wrapped) -> Callable[[], None]:
    """Put a wrapper in the place of a method; the result puts the method back."""
    original = vars(owner)[name]
    ours = functools.wraps(original)(wrap(original))
    setattr(owner, name, ours)

    def back() -> None:
        if vars(owner).get(name) is ours:
            setattr(owner, name, original)

    return back


def _patch_trainer(session: Session, undo: ExitStack) -> None:
    """Once there is a Trainer: a script without one need not wait for its import."""
    from transformers import Trainer

    undo.callback(_replace(Trainer, "_save_checkpoint", functools.partial(_save_checkpoint, session)))


def _init(original: Any, session: Session, trainer: Callable[[], None]) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        session.check(self.state)
        self.kpt = session
        if "transformers.trainer" in sys.modules:
            trainer()

    return __init__


def _prepare(session: Session, original: Any) -> Any:
    from kpt_lightning.huggingface.tracker import follow_trackers

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        session.convert(self.state, args, place=self.device_placement)
        prepared = original(self, *args, **kwargs)
        follow_trackers(self)
        return prepared

    return prepare


def _init_trackers(session: Session, original: Any) -> Any:
    from kpt_lightning.huggingface.tracker import follow_trackers

    def init_trackers(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        follow_trackers(self)
        return result

    return init_trackers


def _prepare_model(session: Session, original: Any) -> Any:
    def prepare_model(
        self: Any, model: Any, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        if not evaluation_mode:
            session.convert(self.state, [model], place=self.device_placement)
        return original(self, model, device_placement, evaluation_mode)

    return prepare_model


def _save_state(session: Session, original: Any) -> Any:
    def save_state(self: Any, output_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
        bound = functools.partial(original, self)
        if args:
            kwargs["safe_serialization"] = args[0]
        return atomic_save_state(self, bound, output_dir, session=session, **kwargs)

    return save_state


def _load_state(session: Session, original: Any) -> Any:
    def load_state(self: Any, input_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
        bound = functools.partial(original, self)
        if args:
            kwargs["load_kwargs"] = args[0]
        return checked_load_state(self, bound, input_dir, session=session, **kwargs)

    return load_state


def _save_checkpoint(session: Session, original: Any) -> Any:
    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        from kpt_lightning.huggingface.trainer_checkpoint import atomic_save_checkpoint

        atomic_save_checkpoint(self, functools.partial(original, self), model, trial, session=session)

    return _save_checkpoint


_METHODS: dict[str, Callable[[Session, Any], Any]] = {
    "prepare": _prepare, "prepare_model": _prepare_model, "init_trackers": _init_trackers, "save_state": _save_state,
    "load_state": _load_state,
}  # fmt: skip

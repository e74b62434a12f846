"""``--report_to kpt`` of the Hugging Face Trainer, and ``log_with="kpt"`` of Accelerate, while a block runs."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from kpt_lightning.optional import ACCELERATE

NAME = "kpt"
INTEGRATIONS = "transformers.integrations.integration_utils"
"""Module of transformers 5.23 with the table that ``--report_to`` is looked up in."""

Undo = Callable[[], None]


@contextmanager
def register_integration(**options: Any) -> Iterator[None]:
    """While the block runs, both know us by the name "kpt".

    Nothing heavy is imported for it: a script that uses neither need not wait. The entry of transformers is made when
    somebody imports transformers.

    Args:
        options: Of :class:`.tracking_callback.KptRunCallback` and :class:`.tracker.KptTracker`.

    Raises:
        MissingDependencyError: Where Accelerate is absent.
    """
    ACCELERATE.require("log_with='kpt'")
    with ExitStack() as undo:
        undo.callback(_when_imported(INTEGRATIONS, lambda module: _add_callback(module, options)))
        undo.callback(_add_tracker(options))
        yield


def _add_callback(module: Any, options: dict[str, Any]) -> Undo:
    class KptRun:
        """The Trainer calls a class; the callback's own can be made only when all of transformers is there."""

        def __new__(cls) -> Any:
            from kpt_lightning.huggingface.tracking_callback import KptRunCallback

            return KptRunCallback(**options)

    return _enter(module.INTEGRATION_TO_CALLBACK, KptRun)


def _add_tracker(options: dict[str, Any]) -> Undo:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    class KptRun:
        """Accelerate calls it with the project's name."""

        name = NAME
        requires_logging_directory = False

        def __new__(cls, run_name: str | None = None, **given: Any) -> Any:
            from kpt_lightning.huggingface.tracker import KptTracker

            return KptTracker(run_name, **{**options, **given})

    return _enter(LOGGER_TYPE_TO_CLASS, KptRun)


def _enter(table: dict[str, Any], entry: type) -> Undo:
    """An entry under our name; the result takes it out and puts back what was there."""
    before = table.get(NAME)
    table[NAME] = entry

    def leave() -> None:
        if table.get(NAME) is entry:
            del table[NAME]
            if before is not None:
                table[NAME] = before

    return leave


def _when_imported(name: str, action: Callable[[ModuleType], Undo]) -> Undo:
    """Act on a module now, or right after somebody imports it; the result undoes it or the waiting."""
    if name in sys.modules:
        return action(sys.modules[name])
    finder = _Awaiting(name, action)
    sys.meta_path.insert(0, finder)
    return finder.undo


class _Awaiting(MetaPathFinder):
    """Finds nothing itself: it waits for one module."""

    def __init__(self, name: str, action: Callable[[ModuleType], Undo]) -> None:
        self.name, self.action = name, action
        self._undo_action: Undo | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        self._stop_waiting()
        spec = importlib.util.find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                execute(module)
                self._undo_action = self.action(module)

            loader.exec_module = exec_module
        return spec

    def _stop_waiting(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def undo(self) -> None:
        self._stop_waiting()
        if self._undo_action is not None:
            self._undo_action()

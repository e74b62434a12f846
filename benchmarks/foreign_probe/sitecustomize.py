"""Notes each loss that a script gives to ``Accelerator.backward``; the script itself stays as it is.

Python imports this by its name where the folder is in PYTHONPATH. Used by foreign_scripts.py, in both runs alike.
"""

import importlib.abc
import importlib.util
import os
import sys
from typing import Any

_MODULE, _FILE = "accelerate.accelerator", os.environ.get("FOREIGN_LOSSES")


class _Finder(importlib.abc.MetaPathFinder):
    """Accelerate is not imported for this: it is met when somebody imports it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            _note_losses(module.Accelerator)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _note_losses(accelerator: type) -> None:
    backward = accelerator.backward  # type: ignore[attr-defined]

    def noted(self: Any, loss: Any, **kwargs: Any) -> Any:
        if self.is_main_process:
            with open(str(_FILE), "a") as file:
                file.write(f"{float(loss.detach())!r}\n")
        return backward(self, loss, **kwargs)

    accelerator.backward = noted  # type: ignore[attr-defined]


if _FILE:
    sys.meta_path.insert(0, _Finder())

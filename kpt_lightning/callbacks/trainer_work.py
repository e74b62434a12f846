"""What a trial runs inside of a Trainer: the user's own training_step on a batch that the Trainer fetched."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kpt_lightning.errors import KptError
from kpt_lightning.validation.state import preserved
from kpt_lightning.validation.workload import ModelOutputError, floating_tensors


class TrainerWork:
    """Forward passes through ``training_step``, past the strategy's wrapper: gradients are not exchanged.

    Attributes:
        batch: On the device, as the Trainer passes it.
    """

    def __init__(
        self, module: "pl.LightningModule", batch: Any, context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Nothing runs yet.

        Args:
            module: The user's.
            batch: One batch of the run.
            context: Entered around each pass: the trainer's precision, and what the changes in force put around it.
        """
        self.module, self.batch, self._context = module, batch, context
        parameters = inspect.signature(module.training_step).parameters
        several = len(parameters) > 1 or any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
        self._more: tuple[int, ...] = (0,) if several else ()

    def loss(self) -> Tensor:
        """One pass.

        Raises:
            ModelOutputError: training_step returned no loss.
        """
        with self._context():
            found = self.module.training_step(self.batch, *self._more)
        loss = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ModelOutputError(
                f"training_step returned {type(loss).__name__} and no scalar loss for the first batch, so nothing can "
                "be tried on it. Remove AutoOptimizeCallback, or return a loss"
            )
        return loss

    def loss_and_outputs(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass with the floating-point outputs of the module's children."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
                seen.update({f"{name}.{place}": each for place, each in floating_tensors(output)})

            return hook

        with ExitStack() as undo:
            for name, child in self.module.named_children():
                undo.callback(child.register_forward_hook(keep(name)).remove)
            return self.loss(), seen


def refuse_exchange(work: TrainerWork) -> None:
    """One pass and its backward pass, in which nothing may be exchanged with other processes, which do not run it.

    Raises:
        KptError: Something would be.
    """
    with preserved(work.module), _Alone():  # type: ignore[no-untyped-call]
        work.loss().backward()  # type: ignore[no-untyped-call]


class _Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses collective operators before they run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            raise KptError(
                f"training_step exchanges data with other processes ({func.name()}), and a trial runs in rank 0 alone. "
                "Make the plan on one device and pass KptStrategy(plan='plan.json'), or remove AutoOptimizeCallback"
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def quiet(module: "pl.LightningModule") -> Iterator[None]:
    """What training_step logs in a trial is no part of the run."""
    names = ("log", "log_dict")
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    for name in names:
        vars(module)[name] = _log_nothing
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]
        vars(module).update(before)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of LightningModule.log."""

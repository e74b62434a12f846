"""A fine-tuning run in Lightning's Trainer: measure, train, measure again, write."""

import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes.config import FineTuneConfig
from kpt_lightning.recipes.export import check_output, write
from kpt_lightning.recipes.registry import make_task
from kpt_lightning.recipes.report import FineTuneResult, Meter, to_terminal
from kpt_lightning.recipes.task import Batch, Say, Task, Totals
from kpt_lightning.recipes.training import add, held_out_loader, make_optimizer, make_schedule, measure, train_loader

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig


class FineTuneModule(LightningModule):
    """A task as a LightningModule, with nothing of kpt in it.

    Attributes:
        totals: Held-out sums of the latest test.
        meter: Told of each step while training.
    """

    def __init__(self, task: Task, config: FineTuneConfig) -> None:
        """Wrap the task's model.

        Args:
            task: Model, loss and metrics.
            config: For optimizer and rates.
        """
        super().__init__()
        self.model = task.model
        self.task, self.config = task, config
        self.totals: Totals = {}
        self.meter: Meter | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one forward pass."""
        loss = self.task.loss(self.model, batch)
        if self.meter is not None:
            self.meter.forward(loss, self.task.count(batch))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Tell the meter of an optimizer step."""
        if self.meter is not None and (batch_idx + 1) % self.config.gradient_accumulation == 0:
            self.meter.step()

    def on_test_start(self) -> None:
        """Forget the test before."""
        self.totals = {}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the sums of a held-out batch."""
        self.totals = add(self.totals, measure(self.task, self.model, batch))

    def configure_optimizers(self) -> "OptimizerLRSchedulerConfig":
        """AdamW with a linear rise and a linear fall."""
        optimizer = make_optimizer(self.model, self.config)
        schedule = make_schedule(optimizer, self.config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fine_tune(
    config: FineTuneConfig,
    *,
    strategy: Strategy | str = "kpt",
    callbacks: Sequence[Callback] = (),
    overwrite: bool = False,
    say: Say = to_terminal,
    task: Task | None = None,
) -> FineTuneResult:
    """Run a recipe on one device, with the held-out figures before and after.

    Args:
        config: As a recipe returns it.
        strategy: For the Trainer; "kpt" is ``KptStrategy()``, "auto" is Lightning's own.
        callbacks: For the Trainer.
        overwrite: ``config.output`` may be replaced.
        say: Receives a line before each step that takes seconds, the plan, and the report.
        task: Another than the recipe's own; its model is trained in place.

    Raises:
        ConfigError: The config does not fit the recipe, the data or the model, or ``output`` is in use.
        MissingDependencyError: An optional package is absent.
        KptError: The loss became NaN or infinite.
        KeyboardInterrupt: Stopped by the user; nothing was written.
    """
    check_output(config.output, overwrite=overwrite)
    # New weights and dropout draw random numbers; the caller's generator stays as it was.
    with torch.random.fork_rng(), _interruptible(), warnings.catch_warnings():
        # The data is in memory: worker processes would only cost.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        torch.manual_seed(config.seed)
        task = make_task(config, say) if task is None else task
        result = _run(task, config, _trainer(config, strategy, callbacks), say)
    say(result.table())
    if config.output is not None:
        write(task, result.model, config.output)
        say(f"Written to {config.output}")
    return result


def _run(task: Task, config: FineTuneConfig, trainer: Trainer, say: Say) -> FineTuneResult:
    module = FineTuneModule(task, config)
    held_out, train = held_out_loader(task, config), train_loader(task, config)
    say("Held-out figures of the model as it came ...")
    before = _held_out(trainer, module, held_out)
    if (plan := getattr(trainer.strategy, "plan", None)) is not None:
        say(plan.render())
    say(f"Training: {config.steps} steps of {config.gradient_accumulation * config.batch_size} rows ...")
    torch.manual_seed(config.seed)
    with Meter(config.steps, trainer.strategy.root_device, task.unit, show=trainer.is_global_zero) as meter:
        module.meter = meter
        trainer.fit(module, train)
        module.meter = None
    # The plan of the training; the test below makes its own.
    plan = getattr(trainer.strategy, "plan", None)
    say("Held-out figures of the trained model ...")
    after = _held_out(trainer, module, held_out)
    return meter.result(
        config=config, driver="lightning", before=before, after=after, plan=plan, model=module.model.cpu()
    )


def _trainer(config: FineTuneConfig, strategy: Strategy | str, callbacks: Sequence[Callback]) -> Trainer:
    if strategy == "kpt":
        from kpt_lightning.strategies.strategy import KptStrategy

        strategy = KptStrategy()
    trainer = Trainer(
        devices=1,
        strategy=strategy,
        max_steps=config.steps,
        max_epochs=1,
        accumulate_grad_batches=config.gradient_accumulation,
        gradient_clip_val=config.max_grad_norm,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    if trainer.world_size != 1:
        rule = f"Lightning's driver trains on one device, and {trainer.world_size} processes were started"
        raise ConfigError("strategy", type(trainer.strategy).__name__, rule, "Take the Accelerate driver")
    return trainer


def _held_out(trainer: Trainer, module: FineTuneModule, loader: Any) -> dict[str, float]:
    trainer.test(module, loader, verbose=False)
    return module.task.conclude(module.totals)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning ignores SIGINT for good once it was sent and exits with 1; here it stays an interrupt."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from ended
        raise
    finally:
        signal.signal(signal.SIGINT, before)

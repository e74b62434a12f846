"""A fine-tuning run as an ordinary Accelerate loop; a launcher or an Accelerator brings kpt into it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import ACCELERATE
from kpt_lightning.recipes.config import FineTuneConfig
from kpt_lightning.recipes.export import check_output, write
from kpt_lightning.recipes.registry import make_task
from kpt_lightning.recipes.report import FineTuneResult, Meter, to_terminal
from kpt_lightning.recipes.task import Say, Task, Totals
from kpt_lightning.recipes.training import add, held_out_loader, make_optimizer, make_schedule, measure, train_loader

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(
    config: FineTuneConfig, *, kpt: bool = True, settings: KptConfig | dict[str, Any] | str | Path | None = None
) -> "Accelerator":
    """The Accelerator of a run that no launcher speeds up.

    Args:
        config: For the gradient accumulation.
        kpt: Whether it converts the model in ``prepare``.
        settings: Of kpt.

    Raises:
        ConfigError: A setting is wrong, or contradicts Accelerate's.
        MissingDependencyError: Where accelerate is absent.
    """
    ACCELERATE.require("Accelerate's driver")
    if kpt:
        from kpt_lightning.huggingface.accelerator import KptAccelerator

        return KptAccelerator(gradient_accumulation_steps=config.gradient_accumulation, kpt=settings)
    from accelerate import Accelerator

    return Accelerator(gradient_accumulation_steps=config.gradient_accumulation)


def fine_tune(
    config: FineTuneConfig,
    *,
    accelerator: "Accelerator | None" = None,
    overwrite: bool = False,
    say: Say = to_terminal,
    task: Task | None = None,
) -> FineTuneResult:
    """Run a recipe on the processes that Accelerate started, with the held-out figures before and after.

    Args:
        config: As a recipe returns it; ``batch_size`` is of one process.
        accelerator: With ``gradient_accumulation_steps`` of the config; None makes Accelerate's own.
        overwrite: ``config.output`` may be replaced.
        say: Receives a line before each step that takes seconds, and the report, on the main process.
        task: Another than the recipe's own; its model is trained in place.

    Raises:
        ConfigError: The config does not fit the recipe, its data or model, or the Accelerator; ``output`` is in use.
        MissingDependencyError: An optional package is absent.
        KptError: The loss became NaN or infinite.
    """
    check_output(config.output, overwrite=overwrite)
    accelerator = accelerator or make_accelerator(config, kpt=False)
    _check(accelerator, config)
    tell: Say = say if accelerator.is_main_process else _silent
    # New weights and dropout draw random numbers; the caller's generator stays as it was.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        task = make_task(config, tell) if task is None else task
        result = _run(task, config, accelerator, tell)
    tell(result.table())
    if config.output is not None:
        if accelerator.is_main_process:
            write(task, result.model, config.output)
        accelerator.wait_for_everyone()
        tell(f"Written to {config.output}")
    return result


def _run(task: Task, config: FineTuneConfig, accelerator: "Accelerator", say: Say) -> FineTuneResult:
    optimizer = make_optimizer(task.model, config)
    # Stepped once for each step of the optimizer, whatever the number of processes: Accelerate's wrapper counts them.
    schedule = make_schedule(optimizer, config)
    model, optimizer, train = accelerator.prepare(
        task.model, optimizer, train_loader(task, config, accelerator.num_processes)
    )
    say("Held-out figures of the model as it came ...")
    before = _held_out(task, model, config, accelerator)
    say(f"Training: {config.steps} steps of {config.gradient_accumulation * config.batch_size} rows a process ...")
    torch.manual_seed(config.seed)
    show = accelerator.is_main_process
    with Meter(config.steps, accelerator.device, task.unit, show=show) as meter:
        for batch in train:
            with accelerator.accumulate(model):
                loss = task.loss(model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            meter.forward(loss, task.count(batch) * accelerator.num_processes)
            if accelerator.sync_gradients:
                schedule.step()
                meter.step()
    say("Held-out figures of the trained model ...")
    after = _held_out(task, model, config, accelerator)
    return meter.result(
        config=config, driver="accelerate", before=before, after=after, plan=_plan_of(accelerator),
        model=accelerator.unwrap_model(model).cpu(),
    )  # fmt: skip


@torch.no_grad()
def _held_out(task: Task, model: Any, config: FineTuneConfig, accelerator: "Accelerator") -> dict[str, float]:
    """Every process measures all rows, so that nothing has to be gathered and no row counts twice."""
    training = model.training
    model.eval()
    totals: Totals = {}
    for batch in held_out_loader(task, config):
        moved = {name: value.to(accelerator.device) for name, value in batch.items()}
        totals = add(totals, measure(task, model, moved))
    model.train(training)
    return task.conclude(totals)


def _check(accelerator: "Accelerator", config: FineTuneConfig) -> None:
    """Refuse what would train something else than the config says."""
    given = accelerator.gradient_accumulation_steps
    if given != config.gradient_accumulation:
        rule = f"the Accelerator accumulates over {given}"
        raise ConfigError("gradient_accumulation", config.gradient_accumulation, rule, "Give both the same")
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        kind = accelerator.distributed_type.value
        rule = "the recipes write a model that one process holds whole"
        raise ConfigError("distributed_type", kind, rule, "Take MULTI_GPU or NO in the file of accelerate launch")


def _plan_of(accelerator: "Accelerator") -> Any:
    """The plan where the Accelerator is kpt's."""
    session = getattr(accelerator, "kpt", None)
    return session.plans[-1] if session is not None and session.plans else None


def _silent(_: object) -> None:
    """Other processes say nothing."""

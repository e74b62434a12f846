"""auto_optimize: the search in a plain loop, on the user's own model object."""

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import detect
from kpt_lightning.optimize.arguments import check_loop, check_search
from kpt_lightning.optimize.by_trial import MAX_SECONDS, plan_by_trial
from kpt_lightning.optimize.driven import drive
from kpt_lightning.optimize.engine import Engine
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.plan_cache import DIRECTORY
from kpt_lightning.optimize.replay import adopted, load_plan
from kpt_lightning.optimize.rules import on_device
from kpt_lightning.validation.workload import LossFunction, Workload

_ENGINES: "weakref.WeakKeyDictionary[nn.Module, Callable[[], Engine | None]]" = weakref.WeakKeyDictionary()
# An engine in use reaches its model, which would live for ever if it were held here: the model itself holds it.


def auto_optimize(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    level: Literal["conservative", "balanced", "aggressive"] | None = None,
    *,
    config: KptConfig | dict[str, Any] | str | Path | None = None,
    loader: Iterable[Any] | None = None,
    goal: Literal["speed", "memory"] = "speed",
    max_seconds: float = MAX_SECONDS,
    cache: bool | str | Path = True,
    plan: Plan | dict[str, Any] | str | Path | None = None,
    progress: bool = True,
) -> nn.Module:
    """Try optimizations on a model and a real batch, and keep those that measurably help, in place.

    Call it before the loop, in the autocast context and the train mode of the loop. Weights, gradients, buffers, random
    state and optimizer are afterwards bit for bit what they were. :func:`plan_of` tells what was done,
    :func:`restore` undoes it.

    Args:
        model: On its device; the same object comes back, with the same Parameter objects.
        batch: One real batch on the same device, fed as ``validation.workload.Workload`` says.
        loss_fn: None where the model returns its loss; a loss of torch.nn or torch.nn.functional gets
            ``(model(inputs), target)``; any other function is called as ``loss_fn(model, batch)``.
        optimizer: The loop's, so that it can be made faster too.
        level: What may change in the numbers; "balanced" by default.
        config: More settings, or the path of a YAML file.
        loader: The loop's DataLoader, so that its settings can be tried too.
        goal: "memory" also proposes what costs speed.
        max_seconds: No trial starts later than that.
        cache: Keep the plan for the next run under ``.kpt/plans``, or in the directory given.
        plan: A plan made before, its dict, or its JSON file: it is applied and nothing is tried.
        progress: Print a line for each trial to stderr.

    Returns:
        ``model``.

    Raises:
        ConfigError: A setting is wrong, or ``plan`` does not fit.
        UnsupportedHardwareError: What was asked for by name is not possible here.
        KptError: The model does not train on this batch.
    """
    built = KptConfig.build(config, level=level)
    check_search(max_seconds, goal)
    check_loop(model, optimizer)
    device = _device(model)
    # What cannot be used is told before the plan in force is undone.
    work = Workload(model, batch, loss_fn) if plan is None else None
    made = None if plan is None else load_plan(plan)
    if made is not None:
        adopted(made, on_device(detect(), device.type), parallel=None, given_precision=None)
    restore(model)
    engine = Engine(built)
    if work is not None:
        subject = _subject(model, built, device, batch, optimizer, loader, goal)
        subject.own_loss = loss_fn is None
        undrive = drive(model, subject)
        try:
            made = plan_by_trial(
                subject, work, precision=_precision(subject), parallel="single", max_seconds=max_seconds,
                cache=_directory(cache), say=_speaker(progress),
            )  # fmt: skip
        finally:
            undrive()
    assert made is not None
    engine.config = made.config
    engine.start(model, device.type, plan=made, optimizer=optimizer, loader=loader)
    _follow(model, engine)
    return model


def plan_of(model: nn.Module) -> Plan | None:
    """The plan in force on ``model`` since :func:`auto_optimize`, None where there is none."""
    engine = _engine(model)
    return None if engine is None else engine.plan


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`auto_optimize`; the weights keep what they learned.

    Returns:
        ``model``.
    """
    engine = _engine(model)
    _ENGINES.pop(model, None)
    if engine is not None:
        engine.stop()
    return model


def _engine(model: nn.Module) -> Engine | None:
    find = _ENGINES.get(model)
    return None if find is None else find()


def _follow(model: nn.Module, engine: Engine) -> None:
    """Enter the plan's contexts at each call, and look at the second training step at what the first ran."""
    if engine.subject is None or not engine.subject.applied:
        # Nothing to undo: it lets go of the model, and keeps the plan.
        engine.stop()
        _ENGINES[model] = lambda: engine
        return
    _ENGINES[model] = weakref.ref(engine)
    engine.own(drive(model, engine.subject, engine.loop_calls, engine.loop_call))


def _subject(
    model: nn.Module, config: KptConfig, device: torch.device, batch: Any, optimizer: torch.optim.Optimizer | None,
    loader: Iterable[Any] | None, goal: Literal["speed", "memory"],
) -> Subject:  # fmt: skip
    autocast = torch.is_autocast_enabled(device.type)
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    return Subject(
        model=model, profile=on_device(detect(), device.type), config=config, device=device,
        compute_dtype=torch.get_autocast_dtype(device.type) if autocast else dtype, owns_precision=not autocast,
        goal=goal, batch=batch, loader=loader, optimizer=optimizer,
    )  # fmt: skip


def _precision(subject: Subject) -> str:
    names = {torch.float32: "32", torch.bfloat16: "bf16" if subject.owns_precision else "bf16-mixed"}
    return names.get(subject.compute_dtype, str(subject.compute_dtype).removeprefix("torch."))


def _device(model: nn.Module) -> torch.device:
    devices = {each.device for each in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no parameter"
        raise ConfigError("model", type(model).__name__, f"must be on one device, found {found}", "Move it to one")
    device = devices.pop()
    if device.type == "meta":
        raise ConfigError("model", type(model).__name__, "is on the meta device", "Give its weights data first")
    return device


def _directory(cache: bool | str | Path) -> Path | None:
    if cache is False:
        return None
    return DIRECTORY if cache is True else Path(cache)


def _speaker(wanted: bool) -> Callable[[str], None]:
    if not wanted:
        return lambda text: None
    console = Console(stderr=True, highlight=False)
    return lambda text: console.print(f"kpt: {text}", markup=False, soft_wrap=True)

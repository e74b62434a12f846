"""AutoOptimizeCallback: before the first batch is trained on, optimizations are tried on it, and the best are kept."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from kpt_lightning.callbacks.trainer_work import TrainerWork, quiet, refuse_exchange
from kpt_lightning.candidates import registry
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import WITHOUT_FLOAT8, KptConfig
from kpt_lightning.errors import ConfigError, KptError
from kpt_lightning.hardware import detect
from kpt_lightning.optimize.arguments import check_search
from kpt_lightning.optimize.by_trial import MAX_SECONDS, plan_by_trial
from kpt_lightning.optimize.engine import HALF, Engine
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.plan_cache import DIRECTORY, model_key
from kpt_lightning.optimize.rules import on_device


class AutoOptimizeCallback(pl.Callback):
    """Tries on the run's own first batch what KptStrategy plans by rules, and more; works beside other strategies too.

    Weights, random state, buffers and optimizers are before the first step what they would be without it. With several
    processes rank 0 tries, without exchanging gradients, and all follow its plan.

    Attributes:
        plan: None until the first batch, then what is in force.
    """

    def __init__(
        self,
        level: Literal["conservative", "balanced", "aggressive"] | None = None,
        *,
        config: KptConfig | dict[str, Any] | str | Path | None = None,
        goal: Literal["speed", "memory"] = "speed",
        max_seconds: float = MAX_SECONDS,
        cache: bool | str | Path = True,
        print_plan: bool = True,
    ) -> None:
        """Check the settings; nothing is touched.

        Args:
            level: What may change in the numbers; beside KptStrategy its level, else "balanced".
            config: More settings; beside KptStrategy they belong there.
            goal: "memory" also proposes what costs speed.
            max_seconds: No trial starts later than that.
            cache: Keep the plan for the next run under ``.kpt/plans``, or in the directory given.
            print_plan: Print the plan as a table.

        Raises:
            ConfigError: A setting is unknown, of the wrong type, or contradicts another one.
        """
        check_search(max_seconds, goal)
        self.config = KptConfig.build(config, level=level)
        self.goal, self.max_seconds, self.print_plan = goal, max_seconds, print_plan
        self.cache = None if cache is False else DIRECTORY if cache is True else Path(cache)
        self.plan: Plan | None = None
        self._engine: Engine | None = None
        self._own = False
        self._model: str | None = None
        self._restored: tuple[dict[str, Any], str | None] | None = None
        self._open = ExitStack()

    @property
    @override
    def state_key(self) -> str:
        return "kpt_lightning.AutoOptimizeCallback"

    @override
    def state_dict(self) -> dict[str, Any]:
        plan = None if self.plan is None else self.plan.to_dict()
        return {"version": 1, "plan": plan, "model": self._model}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("plan") is not None:
            self._restored = state_dict["plan"], state_dict.get("model")

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigError(
                "AutoOptimizeCallback", type(strategy).__name__, "is a strategy that shards or moves the model, which "
                "no trial can be made on", "Make the plan on one GPU and pass KptStrategy(plan='plan.json')",
            )  # fmt: skip
        if not pl_module.automatic_optimization:
            raise ConfigError(
                "AutoOptimizeCallback", type(pl_module).__name__, "uses manual optimization, so a trial of "
                "training_step would train", "Remove the callback; KptStrategy plans by rules",
            )  # fmt: skip
        _refuse_sync(trainer, pl_module)
        if self._leaf_engine(trainer) is not None and self.config.model_fields_set:
            field = sorted(self.config.model_fields_set)[0]
            raise ConfigError(
                f"AutoOptimizeCallback({field})", getattr(self.config, field), "would be ignored beside KptStrategy, "
                "which has settings of its own", "Give it to KptStrategy",
            )  # fmt: skip

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.plan = self._engine = self._model = None
        # Trainer(sync_batchnorm=True) has made its layers by now.
        _refuse_sync(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if self._engine is None:
            self._begin(trainer, pl_module, batch)
        assert self._engine is not None
        if self._own:
            self._engine.training_starts()
        if self._engine.subject is not None:
            # Around the backward pass too: activation checkpointing runs the forward pass again in it.
            self._open.enter_context(self._engine.subject.forward_context())

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._open.close()
        if self._own and self._engine is not None:
            self._engine.loop_calls(looked_at=False)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        # Lightning calls no teardown of callbacks after an exception.
        self._undo()

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._undo()

    def _undo(self) -> None:
        """The model as the user made it; KptStrategy undoes what it owns."""
        self._open.close()
        if self._own and self._engine is not None:
            self._engine.stop()
        self._engine = self._restored = None

    @staticmethod
    def _leaf_engine(trainer: "pl.Trainer") -> Engine | None:
        """The engine of KptStrategy or KptPrecision."""
        engine = getattr(trainer.strategy, "engine", None) or getattr(trainer.precision_plugin, "engine", None)
        return engine if isinstance(engine, Engine) else None

    def _begin(self, trainer: "pl.Trainer", module: "pl.LightningModule", batch: Any) -> None:
        """Plan and apply."""
        shared = self._leaf_engine(trainer)
        self._own = shared is None
        self._engine = engine = Engine(self.config) if shared is None else shared
        given = _given_precision(trainer, shared)
        device = trainer.strategy.root_device
        before = engine.plan
        engine.stop()
        subject = _subject(trainer, module, batch, engine.config, given or _base(before), self.goal)
        self._model = model_key(module)
        plan, problem = self._agreed(trainer, module, subject, given or _base(before))
        if problem:
            raise KptError(problem)
        assert plan is not None
        self.plan = engine.start(
            module, device.type, given, plan=plan, optimizer=subject.optimizer, loader=subject.loader
        )
        if self.print_plan and trainer.is_global_zero:
            from rich.console import Console

            Console().print(self.plan.render())
        else:
            rank_zero_info(f"kpt: {self.plan.summary()}")

    def _agreed(
        self, trainer: "pl.Trainer", module: "pl.LightningModule", subject: Subject, precision: str
    ) -> tuple[Plan | None, str]:
        """Rank 0's plan, or why there is none, on every rank."""
        data, problem = None, ""
        if trainer.world_size == 1:
            return self._found(trainer, module, subject, precision), ""
        raised: Exception | None = None
        if trainer.is_global_zero:
            try:
                data = self._found(trainer, module, subject, precision).to_dict()
            except Exception as error:  # noqa: BLE001  the others wait for an answer, whatever happened here
                raised = error
                problem = str(error) if isinstance(error, KptError) else f"{type(error).__name__}: {error}"
        data, problem = trainer.strategy.broadcast((data, problem))
        if raised is not None:
            raise raised
        return (None if data is None else Plan.from_dict(data)), problem and f"rank 0 found no plan: {problem}"

    def _found(self, trainer: "pl.Trainer", module: "pl.LightningModule", subject: Subject, precision: str) -> Plan:
        if self._restored is not None:
            try:
                plan = Plan.from_dict(self._restored[0])
                _check_restored(plan, subject, same_model=self._restored[1] == self._model)
            except ConfigError as error:
                rank_zero_warn(f"kpt: the plan in the checkpoint is not used: {error}")
            else:
                rank_zero_info("kpt: plan taken from the checkpoint; nothing is tried")
                return plan
        work = TrainerWork(module, subject.batch, lambda: _context(trainer, subject, precision))
        name = getattr(trainer.strategy, "strategy_name", None) or type(trainer.strategy).__name__
        with quiet(module):
            if trainer.world_size > 1:
                refuse_exchange(work)
            plan = plan_by_trial(
                subject, work, precision=precision, parallel=str(name).removeprefix("kpt_"),
                max_seconds=self.max_seconds, cache=self.cache, say=lambda text: rank_zero_info(f"kpt: {text}"),
            )  # fmt: skip
        if subject.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(subject.device)
        return plan


def _refuse_sync(trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
    """Raise ConfigError for a layer that waits for other processes, which a trial does not run in."""
    found = [name for name, each in module.named_modules() if isinstance(each, torch.nn.SyncBatchNorm)]
    if found and trainer.world_size > 1:
        raise ConfigError(
            "AutoOptimizeCallback", found[0], "is a SyncBatchNorm, which waits for all processes, and a trial runs in "
            "one alone", "Make the plan on one device and pass KptStrategy(plan='plan.json')",
        )  # fmt: skip


def _check_restored(plan: Plan, subject: Subject, *, same_model: bool) -> None:
    """Raise ConfigError where a plan of a checkpoint is for another model, or for a level that is not allowed now."""
    if not same_model:
        raise ConfigError("plan", plan.summary(), "was made for another model", "A new one is made")
    allowed = subject.config.level.and_below
    for change in plan.changes:
        level = registry.candidate(change.candidate).level
        if level not in allowed:
            raise ConfigError(
                "plan", change.candidate, f"needs level {level.value!r}, and this run has "
                f"{subject.config.level.value!r}", "A new one is made",
            )  # fmt: skip


def _given_precision(trainer: "pl.Trainer", engine: Engine | None) -> str | None:
    """The trainer's own precision; None where KptStrategy or KptPrecision chooses it."""
    if engine is None:
        return str(trainer.precision_plugin.precision)
    given = getattr(trainer.strategy, "_given_precision", None)
    return None if given is None else str(given)


def _base(plan: Plan | None) -> str:
    """The precision of the unchanged model under an engine of ours: what it would be without FP8."""
    if plan is None:
        return "32"
    return WITHOUT_FLOAT8.get(plan.precision, plan.precision)


def _subject(
    trainer: "pl.Trainer", module: "pl.LightningModule", batch: Any, config: KptConfig, precision: str,
    goal: Literal["speed", "memory"],
) -> Subject:  # fmt: skip
    optimizers = trainer.optimizers
    return Subject(
        model=module, profile=on_device(detect(), trainer.strategy.root_device.type), config=config,
        device=trainer.strategy.root_device, compute_dtype=HALF.get(precision, torch.float32), owns_precision=False,
        goal=goal, own_loss=False, batch=batch, optimizer=optimizers[0] if len(optimizers) == 1 else None,
        loader=_loader(trainer),
    )  # fmt: skip


def _loader(trainer: "pl.Trainer") -> DataLoader[Any] | None:
    """The loader, where there is an epoch to come: that of the present one is under way and keeps its settings."""
    loader = trainer.train_dataloader
    return loader if isinstance(loader, DataLoader) and trainer.max_epochs != 1 else None


@contextmanager
def _context(trainer: "pl.Trainer", subject: Subject, precision: str) -> Iterator[None]:
    """Around a pass of the trial: the precision of the run, and what the changes in force add."""
    with ExitStack() as stack:
        if AutoOptimizeCallback._leaf_engine(trainer) is None:
            stack.enter_context(trainer.precision_plugin.train_step_context())
        elif precision == "bf16-mixed":
            stack.enter_context(torch.autocast(subject.device.type, dtype=torch.bfloat16))
        elif precision == "bf16":
            stack.enter_context(trainer.precision_plugin.tensor_init_context())
        stack.enter_context(subject.forward_context())
        yield

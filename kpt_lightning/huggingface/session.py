"""One config in one process: every model that Accelerate prepares for training is planned for and changed in place."""

import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kpt_lightning.config import BF16_WEIGHTS, KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import VerificationError
from kpt_lightning.huggingface.model_plan import plan_for
from kpt_lightning.huggingface.surroundings import Surroundings, surroundings
from kpt_lightning.optimize.driven import drive, is_driven
from kpt_lightning.optimize.engine import Engine
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.replay import load_plan

if TYPE_CHECKING:
    from accelerate.state import AcceleratorState

Say = Callable[[str], None]


class Session:
    """Plans for models, changes them before Accelerate wraps them, and undoes it.

    Attributes:
        config: The settings.
        plans: Of every model that was converted, in order; the first steps add what they proved.
        left_alone: Why other models were not converted.
    """

    def __init__(
        self,
        config: KptConfig | dict[str, Any] | str | Path | None = None,
        *,
        plan: Plan | dict[str, Any] | str | Path | None = None,
        say: Say | None = None,
    ) -> None:
        """Check the settings; nothing is touched.

        Args:
            config: Settings, or the path of a YAML file.
            plan: A plan made before, its dict, or its JSON file, followed instead of rules.
            say: Receives one line for each model, on the main process; None writes it to stderr.

        Raises:
            ConfigError: A setting is unknown, of the wrong type, or contradicts another one.
        """
        self.config = KptConfig.build(config)
        self.plans: list[Plan] = []
        self.left_alone: list[Rejected] = []
        self._given = None if plan is None else load_plan(plan)
        self._say = say or _to_stderr
        # An engine in use reaches its model, which would live for ever if it were held here: the model holds it.
        self._engines: list[weakref.ref[Engine]] = []
        self._main = True
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def check(self, state: "AcceleratorState") -> Surroundings:
        """What Accelerate has decided. Raises ConfigError where it contradicts the config."""
        return surroundings(state, self.config)

    def convert(self, state: "AcceleratorState", objects: Sequence[Any], *, place: bool = True) -> None:
        """Convert the models among ``objects``, before they are wrapped; what is no model or no new one stays.

        Args:
            state: Accelerate's.
            objects: What is given to ``Accelerator.prepare``.
            place: Move the models to the device first, as Accelerate does right afterwards.

        Raises:
            ConfigError: Accelerate's settings contradict the config.
            UnsupportedHardwareError: What was asked for by name is not possible here.
        """
        around = self.check(state)
        optimizers = [each for each in objects if isinstance(each, torch.optim.Optimizer)]
        for model in (each for each in objects if isinstance(each, nn.Module)):
            if self.knows(model) or getattr(model, "_is_accelerate_prepared", False):
                continue
            self._seen.add(model)
            if not any(parameter.requires_grad for parameter in model.parameters()):
                self.left_alone.append(Rejected(type(model).__name__, "it has no parameter to train"))
                continue
            self._start(model, around, state, _optimizers_of(model, optimizers), place)

    def knows(self, model: nn.Module) -> bool:
        """Whether the model was looked at, here or by another session."""
        return model in self._seen or is_driven(model)

    def conclude(self) -> None:
        """Tell what was proved, once the script has ended.

        Raises:
            VerificationError: Nothing was prepared for training, with ``on_mismatch="raise"``.
        """
        if not self.plans:
            others = "".join(f"; {each.subject}: {each.reason}" for each in self.left_alone)
            text = f"no model was prepared for training, so nothing was changed{others}"
            if self.config.on_mismatch == "raise":
                raise VerificationError(f"{text}. on_mismatch='warn' goes on")
            self._say(text)
        elif self._main:
            for plan in self.plans:
                for proof in plan.proofs:
                    self._say(f"{'proved: ' if proof else ''}{proof.subject}: {proof.reason}")

    def stop(self) -> None:
        """Undo everything; the weights keep what they learned."""
        engines, self._engines = [reference() for reference in self._engines], []
        for engine in engines:
            if engine is not None:
                engine.stop()

    def _start(
        self,
        model: nn.Module,
        around: Surroundings,
        state: "AcceleratorState",
        optimizers: list[torch.optim.Optimizer],
        place: bool,
    ) -> None:
        place = place and around.parallel != "fsdp2" and getattr(model, "hf_device_map", None) is None
        if place:
            # Parameter objects stay, and with them optimizers that were made before.
            model.to(around.device)
        engine = Engine(self.config)
        engine.parallel, engine.why_parallel = around.parallel, "Accelerate's own"
        plan = self._given or plan_for(model, self.config, around)
        engine.plan_given = self._given
        optimizer = optimizers[0] if len(optimizers) == 1 else None
        engine.start(model, around.device.type, _given_precision(plan, around), plan=plan)
        try:
            if place:
                engine.look(_agreement(around))
            engine.take_optimizers(optimizers)
            assert engine.plan is not None
            self.plans.append(engine.plan)
            if engine.subject is None or not (engine.subject.applied or _needs_autocast(engine.plan, around)):
                engine.stop()
            else:
                self._follow(model, engine, around, optimizer)
        except BaseException:
            engine.stop()
            raise
        self._main = state.is_main_process
        if self._main:
            self._say(f"{type(model).__name__}: {engine.plan.summary()}")

    def _follow(
        self, model: nn.Module, engine: Engine, around: Surroundings, optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Enter the plan's contexts around each call, and check what the first steps ran."""
        subject = engine.subject
        assert subject is not None
        assert engine.plan is not None
        self._engines.append(weakref.ref(engine))
        if around.compiles:
            # Whatever stands in the call would be traced: the optimizer's steps are counted instead.
            vars(model)["_kpt_engine"] = engine
            engine.own(lambda: vars(model).pop("_kpt_engine", None))
            if optimizer is not None:
                hook = optimizer.register_step_post_hook(lambda *_: engine.loop_calls(looked_at=False))
                engine.own(hook.remove)
            return
        context = _autocast(around.device.type) if _needs_autocast(engine.plan, around) else None
        engine.own(drive(model, subject, engine.loop_calls, engine.loop_call, context))


def _optimizers_of(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    mine = {id(parameter) for parameter in model.parameters()}
    return [
        each for each in optimizers if any(id(one) in mine for group in each.param_groups for one in group["params"])
    ]


def _given_precision(plan: Plan, around: Surroundings) -> str | None:
    """Accelerate's precision where it stays in charge."""
    return around.precision if plan.precision == around.precision else None


def _needs_autocast(plan: Plan, around: Surroundings) -> bool:
    """The plan runs in bf16 and Accelerate does not see to it."""
    low = plan.precision in ("fp8", "bf16-mixed", *BF16_WEIGHTS)
    return low and around.precision == "32"


def _autocast(device_type: str) -> Callable[[], Any]:
    return lambda: torch.autocast(device_type, dtype=torch.bfloat16)


def _agreement(around: Surroundings) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Rank 0's plan for all."""
    if around.processes == 1:
        return lambda plan: plan

    def agree(plan: dict[str, Any]) -> dict[str, Any]:
        from accelerate.utils import broadcast_object_list

        shared: list[dict[str, Any]] = broadcast_object_list([plan], from_process=0)
        return shared[0]

    return agree


def _to_stderr(line: str) -> None:
    print(f"kpt: {line}", file=sys.stderr, flush=True)

"""The engine: plans for a model, applies the plan in place, proves in the first steps that it ran, and undoes it."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kpt_lightning.attention.observe import observe_attention
from kpt_lightning.attention.proof import check_backend, describe
from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.inductor import GraphRuns, count_graph_runs
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import BF16_WEIGHTS, FP8_PRECISIONS, KptConfig
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import KptError, VerificationError
from kpt_lightning.hardware import HardwareProfile, detect
from kpt_lightning.optimize.apply import applied, split_by_need
from kpt_lightning.optimize.by_proof import extended
from kpt_lightning.optimize.graphs import GraphCounts, check_graphs, check_recompiles, late_findings
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.profiled import judge_kernels, kernels_of, why_no_profile
from kpt_lightning.optimize.replay import adopted
from kpt_lightning.optimize.rules import ASKED, check_explicit, make_plan, on_device
from kpt_lightning.precision.evidence import check_calls, check_gradients, check_merged
from kpt_lightning.precision.float8_linear import Float8Linear
from kpt_lightning.precision.foreign_linear import ForeignLinear
from kpt_lightning.precision.gemm import GemmCounts, count_gemms

# With manual optimization, optimizer steps of other modules that may come before the first FP8 GEMM.
_OTHERS_TURNS = 16

HALF = dict.fromkeys(("bf16-mixed", "bf16", "bf16-true", *FP8_PRECISIONS), torch.bfloat16) | dict.fromkeys(
    ("16-mixed", "16-true"), torch.float16
)
"""Precisions by name, with the dtype that their matrix products run in; others run in fp32."""


class Engine:
    """One model at a time. Lightning, Fabric and plain loops all drive this.

    Attributes:
        config: The settings.
        parallel: single, ddp or fsdp2, set by the strategy that binds it; None beside a strategy of Lightning's.
        why_parallel: The reason for it.
        plan: None until :meth:`start`, then the plan of the last model, also after :meth:`stop`.
        plan_given: Followed instead of rules by each start that is given none.
    """

    def __init__(self, config: KptConfig) -> None:
        """Nothing is detected or touched yet.

        Args:
            config: The settings.
        """
        self.config = config
        self.parallel: str | None = None
        self.why_parallel = ASKED
        self.plan: Plan | None = None
        self.plan_given: Plan | None = None
        self._undo, self._counting = ExitStack(), ExitStack()
        self._model: weakref.ref[nn.Module] | None = None
        self._counts: GemmCounts | None = None
        self._graphs: GraphCounts | None = None
        self._graphs_then: GraphCounts | None = None
        self._runs: GraphRuns | None = None
        self._layers: list[Float8Linear] = []
        self._foreign = 0
        self._subject: Subject | None = None
        self._waiting: list[Change] = []
        self._device_type = "cpu"
        self._steps, self._idle, self._training = 0, 0, False

    def __getstate__(self) -> dict[str, Any]:
        """Settings and plan only: what is applied belongs to live modules."""
        return {
            "config": self.config,
            "parallel": (self.parallel, self.why_parallel),
            "plan": self.plan,
            "plan_given": self.plan_given,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """An engine that has not started."""
        self.__init__(state["config"])  # type: ignore[misc]
        (self.parallel, self.why_parallel), self.plan = state["parallel"], state["plan"]
        self.plan_given = state["plan_given"]

    def check(self, device_type: str) -> None:
        """Refuse what this machine cannot do, before a model is there. Raises as ``check_explicit``."""
        check_explicit(self.config, on_device(detect(), device_type))

    def start(
        self,
        model: nn.Module,
        device_type: str,
        given_precision: str | None = None,
        *,
        plan: Plan | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loader: Iterable[Any] | None = None,
    ) -> Plan:
        """Plan for ``model`` and change it in place; on an error it is left as it was. A second start begins anew.

        Args:
            model: On any device.
            device_type: Where it will run: "cuda" or "cpu".
            given_precision: Name of the trainer's own precision, which then stays in charge.
            plan: Made before, by trial or for another run; None makes one by rules.
            optimizer: For a plan that changes it.
            loader: Likewise.

        Raises:
            UnsupportedHardwareError: The plan asks for a unit that is not there.
            ConfigError: The given plan does not fit this model.
            KptError: Another model is started and not stopped.
        """
        first = None if self._model is None else self._model()
        if first is not None and first is not model:
            raise KptError(
                f"{type(first).__name__} is optimized already and {type(model).__name__} came second: one engine "
                "serves one model. Put both into one module, or set up the second with a Trainer or Fabric of its own"
            )
        self.stop()
        profile: HardwareProfile = on_device(detect(), device_type)
        self._device_type = device_type
        parallel = None if self.parallel is None else Accepted(f"parallel {self.parallel}", self.why_parallel)
        waits = plan is None and self.plan_given is not None
        plan = plan or self.plan_given
        if plan is None:
            plan = make_plan(model, self.config, profile, parallel=parallel, given_precision=given_precision)
        else:
            plan = adopted(plan, profile, parallel=parallel, given_precision=given_precision)
        self._subject = Subject(
            model=model, profile=profile, config=plan.config, device=torch.device(device_type), optimizer=optimizer,
            loader=loader, compute_dtype=HALF.get(plan.precision, torch.float32),
        )  # fmt: skip
        with ExitStack() as undo:
            undo.callback(self._forget)
            self._graphs = GraphCounts.now() if plan.compiled_modules else None
            now, self._waiting = split_by_need(plan.changes) if waits else (plan.changes, [])
            undo.enter_context(applied(self._subject, now))
            self._layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
            self._foreign = sum(isinstance(layer, ForeignLinear) for layer in self._layers)
            undo.callback(self._counting.close)
            if len(self._layers) > self._foreign:
                self._counts = self._counting.enter_context(count_gemms())
            if plan.compiled_modules:
                self._runs = self._counting.enter_context(count_graph_runs())
            # Last, because rounding cannot be undone.
            if plan.precision in BF16_WEIGHTS:
                model.to(torch.bfloat16)
            self._undo = undo.pop_all()
        self._steps, self._idle, self._training = 0, 0, False
        # A plan that changes nothing lets another model follow.
        self._model, self.plan = weakref.ref(model) if plan.changes else None, plan
        return plan

    def look(self, agree: Callable[[dict[str, Any]], dict[str, Any]] = lambda plan: plan) -> None:
        """Add to a plan by rules what proves itself on the model, on its device by now; ``agree`` makes ranks one."""
        model, plan, subject = None if self._model is None else self._model(), self.plan, self._subject
        given = self.plan_given is not None
        if model is None or plan is None or subject is None or given or not plan.float8_layers:
            return
        self.stop()
        device = next(model.parameters()).device
        plan = extended(plan, replace(subject, device=device, contexts=[], applied=[], key=""))
        self.start(model, device.type, plan=Plan.from_dict(agree(plan.to_dict())))

    def take_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Apply what of a given plan had to wait for the optimizer, which is made after the model is set up.

        Raises:
            ConfigError: The plan changes an optimizer of another kind, or there are several.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting or self._subject is None or self.plan is None:
            return
        self._subject.optimizer = optimizers[0] if len(optimizers) == 1 else None
        lookup = registry.candidate
        mine = [change for change in waiting if lookup(change.candidate).stage is Stage.OPTIMIZER]
        self._undo.enter_context(applied(self._subject, mine))
        for change in (change for change in waiting if change not in mine):
            reason = "a strategy does not see the loader; AutoOptimizeCallback does"
            self.plan.choices.append(Rejected(change.candidate, reason))

    def stop(self) -> None:
        """Undo everything; the modules are as the user made them.

        The weights keep what they learned, and those that were cast to bf16 stay so: what rounding took is gone.
        """
        late = self._late_findings()
        self._undo.close()
        for reason in late:
            warnings.warn(f"kpt: {reason}", stacklevel=2)

    def _late_findings(self) -> list[str]:
        """What only shows at the end: FP8 that never had its turn, blocks that fell back to Python after step 1."""
        if self._idle and not self._steps:
            return [f"no FP8 GEMM ran in {self._idle} optimizer steps"]
        if self._graphs is None or self.plan is None or not self._steps:
            return []
        if self._graphs_then is not None:
            self.plan.proofs.append(check_recompiles(self._graphs_then))
        if not all(self.plan.explain("whole graphs")):
            return []
        late = late_findings(self._graphs, self.plan.compiled_modules)
        self.plan.proofs += late
        return [f"after step 1: {proof.reason}" for proof in late]

    def _forget(self) -> None:
        self._model, self._counts, self._graphs, self._layers, self._idle = None, None, None, [], 0
        self._graphs_then = self._runs = None
        self._subject = None

    @property
    def subject(self) -> Subject | None:
        """The model with what surrounds it, while it is started."""
        return self._subject

    def own(self, undo: Callable[[], None]) -> None:
        """Let :meth:`stop` call ``undo`` before anything else is undone."""
        self._undo.callback(undo)

    def loop_calls(self, *, looked_at: bool = True) -> None:
        """The model is about to be called in a plain loop: at the second training step the first is checked.

        Args:
            looked_at: :meth:`loop_call` makes the call.
        """
        model = None if self._model is None else self._model()
        if self._steps or model is None or not (model.training and torch.is_grad_enabled()):
            return
        if self._training and self._counts is not None and not self._counts.of_role("grad_input"):
            # Still before the first backward pass: the model is called several times a step.
            return
        if self._training:
            self.prove()
            if not looked_at:
                self._counting.close()
            return
        self.training_starts()

    def loop_call(self, run: Callable[[], Any]) -> Any:
        """Make one call of the model in a plain loop: in the second and third training step its kernels are looked at.

        The backward pass runs outside of it, where another profiler may start.
        """
        model = None if self._model is None else self._model()
        if self.plan is None or model is None or not (model.training and torch.is_grad_enabled()):
            return run()
        if self._steps not in (1, 2):
            return run()
        self._steps += 1
        if self._steps == 3:
            return self._observed(run, whole=True)
        try:
            return self._profiled(run, whole=True) if self._layers else run()
        finally:
            self._counting.close()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Context of a forward pass: the plan's precision, and what the plan's changes put around it."""
        precision = self.plan.precision if self.plan is not None else self.config.precision
        with ExitStack() as stack:
            if precision in ("fp8", "bf16-mixed"):
                stack.enter_context(torch.autocast(self._device_type, dtype=torch.bfloat16))
            if self._subject is not None:
                stack.enter_context(self._subject.forward_context())
            yield

    def training_starts(self) -> None:
        """Called before each training step; the first call forgets what a sanity validation ran."""
        if self._counts is not None and not self._training:
            self._counts.clear()
        if self._runs is not None and not self._training:
            self._runs.total = 0
        self._training = True

    def step(self, run: Callable[[], Any], *, whole: bool) -> Any:
        """Run one optimizer step; the first ones are checked against the plan.

        Args:
            run: Does the step.
            whole: ``run`` includes forward and backward, so that its kernels can be looked at.

        Raises:
            VerificationError: Something planned did not run.
        """
        if self.plan is None or self._steps > 2:
            return run()
        if self._steps == 2:
            self._steps = 3
            return self._observed(run, whole)
        if self._steps == 1:
            self._steps = 2
            try:
                return self._profiled(run, whole) if self._layers else run()
            finally:
                self._counting.close()
        result = run()
        if not self._too_early(result, whole):
            self.prove(whole=whole)
        return result

    def prove(self, *, whole: bool = True) -> None:
        """Check what the first step ran against the plan.

        Args:
            whole: The step is known to have called the model.

        Raises:
            VerificationError: Something planned did not run, or less than planned with ``on_mismatch="raise"``.
        """
        assert self.plan is not None
        self._steps = 1
        if self._graphs is not None:
            self._graphs_then = GraphCounts.now()
        for proof in self._proofs(whole):
            self._hold(proof)

    def _hold(self, proof: Decision) -> None:
        assert self.plan is not None
        self.plan.proofs.append(proof)
        if proof:
            return
        if self.config.on_mismatch == "raise":
            raise VerificationError(f"{proof.reason}. on_mismatch='warn' goes on")
        warnings.warn(f"kpt: {proof.reason}", stacklevel=3)

    def _too_early(self, result: Any, whole: bool) -> bool:
        """No FP8 GEMM ran and that can be right: a skipped step, or another optimizer's turn."""
        if self._counts is None or self._counts.total:
            return self._counts is None and whole and result is None
        self._idle += 1
        return result is None if whole else self._idle < _OTHERS_TURNS

    def _proofs(self, whole: bool) -> list[Decision]:
        """What the first step showed."""
        assert self.plan is not None
        proofs: list[Decision] = []
        if self._counts is not None:
            own = [layer for layer in self._layers if not isinstance(layer, ForeignLinear)]
            proofs += check_calls(self._counts, own)
            # Told, not held: the size of a batch decides.
            self.plan.proofs += check_merged(self._counts, self.plan.merges_float8)
        # Layers that did not run have no gradient, and were named already.
        if self._layers and all(proofs):
            proofs += check_gradients(self._layers)
        if self._graphs is not None:
            runs = self._runs.total if whole and self._runs is not None else None
            proofs += check_graphs(self._graphs, self.plan.compiled_modules, runs)
        return proofs

    def _profiled(self, run: Callable[[], Any], whole: bool) -> Any:
        assert self.plan is not None
        reason = why_no_profile(self.config, self._device_type, whole)
        if reason is not None:
            other = "nothing else shows what another library runs" if self._counts is None else "calls were counted"
            self.plan.proofs.append(Rejected("fp8 kernels", f"{reason}; {other}"))
            return run()
        before = self._launched()
        result, names = kernels_of(run)
        # Another library's layers are not counted: each has at least its output GEMM.
        self._hold(judge_kernels(names, self._launched() - before + self._foreign))
        return result

    def _observed(self, run: Callable[[], Any], whole: bool) -> Any:
        """One step whose attention calls are looked at: which kernel, causal or not, with a mask tensor or without."""
        assert self.plan is not None
        planned = self.plan.setting("attention_backend").get("backend")
        wanted = self._device_type == "cuda" or planned is not None
        if not wanted or why_no_profile(self.config, self._device_type, whole, needs_cuda=False) is not None:
            return run()
        results: list[Any] = []
        calls = observe_attention(lambda: results.append(run()))
        if planned is not None:
            self._hold(check_backend(calls, planned))
        elif calls:
            self.plan.proofs += describe(calls)
        return results[0]

    def _launched(self) -> int:
        return 0 if self._counts is None else self._counts.launched

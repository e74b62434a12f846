"""Whether other code does what a module does: its output and every gradient, on random input of the recorded shapes.

Both are compared with a float64 copy of the module: code that rounds less than the module is not refused for being
different, and code that rounds more is.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.validation.attempt import Done, Failure, attempt
from kpt_lightning.validation.calls import ModuleCall
from kpt_lightning.validation.draw import draw, floating_dtypes, foreign_argument, in_float32, in_float64
from kpt_lightning.validation.gates import PARITY_FACTOR, PARITY_ULPS
from kpt_lightning.validation.module_run import ModuleRun, run_module
from kpt_lightning.validation.state import preserved

SCALES = (1.0, 30.0, 1e-3, 0.0)
"""Of the input: an epsilon shows where the input is small, overflow where it is large, a division by zero at zero."""

# Weights are moved by this part of their size: many formulas agree where a weight is exactly one or zero.
_MOVED = 0.1

# A float64 copy further than this from the module computes something else, and is no reference.
_FARTHEST, _FARTHEST_ULPS = 2.0**-6, 64.0


def compare_modules(
    original: nn.Module,
    replacement: Callable[..., Any] | nn.Module,
    call: ModuleCall,
    *,
    scales: Sequence[float] = SCALES,
    factor: float = PARITY_FACTOR,
    ulps: float = PARITY_ULPS,
    seed: int = 0,
) -> Decision:
    """Compare what two pieces of code return, and the gradient of each input and parameter from random cotangents.

    A replacement that is a module, with parameters of the same names, is compared once more on float32 copies of both
    with moved weights: what rounding hides in bf16, and what only holds at the initial weights, shows there. A function
    is compared in the recorded dtypes and with the present weights alone.

    Nobody's ``.grad``, buffers, train mode or random state is changed.

    Args:
        original: The module as it is.
        replacement: Called with the same arguments. A function computes with the parameters of ``original``.
        call: A recorded call of ``original``: shapes, dtypes, autocast and train mode.
        scales: Of the random input.
        factor: The replacement's error may be this many times the original's own.
        ulps: Or this many units of roundoff of the coarsest dtype in play.
        seed: Of the random values.

    Returns:
        Rejected with the tensor, the scale and both errors where they differ; errors are Euclidean norms of the
        difference, relative to the exact tensor.
    """
    subject = type(original).__name__
    if foreign := foreign_argument(call):
        return Rejected(subject, f"it is called with a {foreign}, which may keep state: random input cannot stand in")
    with ExitStack() as stack:
        stack.enter_context(preserved(original))
        if isinstance(replacement, nn.Module):
            stack.enter_context(preserved(replacement))
        compared, reason = _Comparison(original, replacement, call, factor, ulps, seed).at_all(scales)
        if reason is None and isinstance(replacement, nn.Module):
            pair = attempt(lambda: (_moved(original, seed), _moved(replacement, seed)))
            if isinstance(pair, Failure):
                return Rejected(subject, f"no copy of it can be made, to compare with other weights: {pair.text}")
            moved = _Comparison(*pair.value, in_float32(call), factor, ulps, seed)
            also, reason = moved.at_all(scales)
            compared = [scale for scale in compared if scale in also]
            reason = f"in float32 with other weights, {reason}" if reason else None
    if reason:
        return Rejected(subject, reason)
    return Accepted(subject, f"output and every gradient agree at scales {', '.join(f'{each:g}' for each in compared)}")


@dataclass(frozen=True, slots=True)
class _Comparison:
    original: nn.Module
    replacement: Callable[..., Any] | nn.Module
    call: ModuleCall
    factor: float
    ulps: float
    seed: int

    def at_all(self, scales: Sequence[float]) -> tuple[list[float], str | None]:
        """The scales at which both agree, and why they do not at another."""
        theirs, mine = _parameters(self.original), _parameters(self.replacement) or _parameters(self.original)
        if theirs.keys() != mine.keys():
            return [], f"parameters differ in name: {', '.join(sorted(theirs.keys() ^ mine.keys()))}"
        for module in (self.original, self.replacement):
            if isinstance(module, nn.Module):
                module.train(self.call.training)
        reference = self._reference()
        trusted: set[str] | None = None
        compared: list[float] = []
        for scale in scales:
            base = self._run(self.original, scale)
            if isinstance(base, Failure):
                return compared, f"the module itself fails on random input: {base.text}"
            if base.value.disturbed is not None:
                return compared, f"the module itself changes its {base.value.disturbed} in place"
            # Nothing can be said where the module itself overflows.
            if not base.value.finite():
                continue
            run = self._run(self.replacement, scale)
            if isinstance(run, Failure):
                return compared, f"the replacement fails at scale {scale:g}: {run.text}"
            exact = self._exact(reference, scale) or base.value
            # Later scales may be beyond what the module's own dtype can do; that makes the copy no worse.
            trusted = self._trusted(exact, base.value) if trusted is None else trusted
            if reason := self._difference(exact, base.value, run.value, trusted):
                return compared, f"{reason} at scale {scale:g}"
            compared.append(scale)
        return compared, None if compared else "the module itself gives NaN or infinity at every scale"

    def _run(self, which: Callable[..., Any], scale: float) -> Done[ModuleRun] | Failure:
        parameters = _parameters(which) or _parameters(self.original)
        twice = which is not self.original
        arguments = draw(self.call, scale, self.seed)
        return attempt(lambda: run_module(which, parameters, arguments, self.call.autocast, self.seed, twice=twice))

    def _reference(self) -> nn.Module | None:
        """A float64 copy; None where there can be none."""
        first, second = (self._forward(seed) for seed in (self.seed, self.seed + 1))
        # A copy in another dtype would draw other numbers in its dropout.
        if len(first) != len(second) or not all(map(torch.equal, first, second)):
            return None
        made = attempt(lambda: copy.deepcopy(self.original).double())
        return made.value if isinstance(made, Done) else None

    def _forward(self, seed: int) -> list[Tensor]:
        arguments = draw(self.call, 1.0, self.seed)
        done = attempt(lambda: run_module(self.original, {}, arguments, self.call.autocast, seed, backward=False))
        return done.value.tensors() if isinstance(done, Done) else []

    def _exact(self, reference: nn.Module | None, scale: float) -> ModuleRun | None:
        if reference is None:
            return None
        arguments = in_float64(draw(self.call, scale, self.seed))
        done = attempt(lambda: run_module(reference, _parameters(reference), arguments, None, self.seed))
        return done.value if isinstance(done, Done) and done.value.finite() else None

    def _trusted(self, exact: ModuleRun, base: ModuleRun) -> set[str]:
        """The figures that a float64 copy gives like the module itself."""
        farthest = max(_FARTHEST, _FARTHEST_ULPS * self._roundoff())
        return {name for name, each in base.figures.items() if _error(exact.figures.get(name), each) <= farthest}

    def _difference(self, exact: ModuleRun, base: ModuleRun, run: ModuleRun, trusted: set[str]) -> str | None:
        if run.disturbed is not None:
            return f"the replacement changes its {run.disturbed} in place"
        if form := base.form_difference(run):
            return form
        roundoff = self._roundoff()
        for name, found in run.figures.items():
            place = name.removesuffix(ModuleRun.AGAIN)
            truth = exact.figures.get(place) if place in trusted else base.figures[place]
            if found is not None and not bool(found.isfinite().all()):
                return f"{name} holds NaN or infinity, not so in the module,"
            own, error = _error(truth, base.figures[place]), _error(truth, found)
            if error > (allowed := max(self.factor * own, self.ulps * roundoff)):
                figures = f"relative error {error:.1e} against {own:.1e} of the module itself, allowed {allowed:.1e},"
                return f"{name}: {'no gradient flows,' if found is None else figures}"
        return None

    def _roundoff(self) -> float:
        """Half a unit in the last place of the coarsest dtype in play."""
        dtypes = floating_dtypes(self.call) | {each.dtype for each in _parameters(self.original).values()}
        return max(torch.finfo(each).eps / 2 for each in dtypes | {self.call.autocast or torch.float64})


def _parameters(which: Callable[..., Any]) -> dict[str, nn.Parameter]:
    return dict(which.named_parameters()) if isinstance(which, nn.Module) else {}


def _error(exact: Tensor | None, value: Tensor | None) -> float:
    """Relative to the norm of the exact tensor; infinite where that is zero and the value is not. None is zero."""
    if exact is None and value is None:
        return 0.0
    if exact is None or value is None:
        known = exact if exact is not None else value
        zero = known is None or not bool(known.any())
        return 0.0 if zero else (1.0 if value is None else math.inf)
    wanted = exact.double()
    error = float(torch.linalg.vector_norm(wanted - value.double()))
    norm = float(torch.linalg.vector_norm(wanted))
    return 0.0 if error == 0 else (error / norm if norm else math.inf)


def _moved(module: nn.Module, seed: int) -> nn.Module:
    """A float32 copy whose parameters are all trained and a little off."""
    moved = copy.deepcopy(module).float().requires_grad_(True)
    for index, (_, parameter) in enumerate(sorted(moved.named_parameters())):
        generator = torch.Generator(parameter.device).manual_seed(seed + 100 + index)
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        size = float(parameter.detach().square().mean().sqrt()) if parameter.numel() else 0.0
        parameter.data.add_(noise, alpha=_MOVED * (size or 1.0))
    return moved

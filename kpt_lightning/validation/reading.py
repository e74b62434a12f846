"""What one forward and backward pass gave, small enough to keep, and how far another one is from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.measure.statistics import median
from kpt_lightning.validation.gates import Gate
from kpt_lightning.validation.numerics import sqnr_db
from kpt_lightning.validation.state import preserved, seed_all

SAMPLE = 2**16
"""Elements kept of each tensor, evenly strided: figures over more differ in the second decimal of a dB."""

SEED = 20_260_101

_EXACT_DB = 150.0
"""Above what fp32 gives."""

Pass = Callable[[], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Reading:
    """One pass.

    Attributes:
        loss: Its value.
        outputs: Place in the output of the model to a sample of it, floating-point tensors only.
        gradients: Parameter name to a sample of its gradient; None where it got none.
    """

    loss: float
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def read(model: nn.Module, forward: Pass, *, seed: int = SEED) -> Reading:
    """Run once, forward and backward, with seeded generators; the model is as before.

    Args:
        model: Whose gradients are read.
        forward: Gives the loss and the outputs of the model by place.
        seed: For every random generator.
    """
    with preserved(model):
        seed_all(seed)
        value, outputs = forward()
        kept = {place: sample(each) for place, each in outputs.items()}
        value.backward()  # type: ignore[no-untyped-call]
        gradients = {
            name: None if each.grad is None else sample(each.grad)
            for name, each in model.named_parameters()
            if each.requires_grad
        }
        return Reading(float(value.detach()), kept, gradients)


def sample(tensor: Tensor) -> Tensor:
    """At most about :data:`SAMPLE` elements of a tensor, as a copy in float32 or float64."""
    plain = tensor.detach()
    plain = plain.to_dense() if plain.layout is not torch.strided else plain
    flat = (torch.view_as_real(plain) if plain.is_complex() else plain).flatten()
    stride = max(1, flat.numel() // SAMPLE)
    # An odd stride meets every column of a matrix with a power of two of them.
    kept = flat[:: stride + (stride % 2 == 0) * (stride > 1)]
    return kept.to(torch.float64 if kept.dtype == torch.float64 else torch.float32, copy=True)


@dataclass(frozen=True, slots=True)
class Distance:
    """How far one reading is from another, in dB of SQNR: larger is nearer, infinite is equal.

    Attributes:
        loss: Of the loss.
        outputs: Of the worst output.
        gradients: Of each gradient, by parameter.
        missing: Parameters that have a gradient in one reading alone, and outputs that do not match.
    """

    loss: float
    outputs: float
    gradients: dict[str, float]
    missing: tuple[str, ...]

    @property
    def worst(self) -> tuple[str, float]:
        """The worst gradient and its figure."""
        return min(self.gradients.items(), key=lambda item: _order(item[1]), default=("", float("inf")))

    @property
    def median_gradient(self) -> float:
        """The median over the gradients."""
        finite = [1e4 if value == float("inf") else value for value in self.gradients.values()]
        return median(finite) if finite else float("inf")  # type: ignore[return-value]


def distance(exact: Reading, other: Reading) -> Distance:
    """Compare two readings of one model."""
    missing = [
        name
        for name in exact.gradients.keys() | other.gradients.keys()
        if (exact.gradients.get(name) is None) != (other.gradients.get(name) is None)
    ]
    # A kernel that gives the loss alone may leave out what it was made from; what is there must agree.
    shared = exact.outputs.keys() & other.outputs.keys()
    unlike = [place for place in shared if exact.outputs[place].shape != other.outputs[place].shape]
    missing += [f"shape of output {place}" for place in unlike]
    figures = [_db(exact.outputs[place], other.outputs[place]) for place in shared if place not in unlike]
    outputs = min(figures, key=_order, default=float("inf"))
    gradients = {
        name: _db(one, two)
        for name, one in exact.gradients.items()
        if one is not None and (two := other.gradients.get(name)) is not None
    }
    loss = _db(torch.tensor([exact.loss], dtype=torch.float64), torch.tensor([other.loss], dtype=torch.float64))
    return Distance(loss, outputs, gradients, tuple(sorted(missing)))


def widest(distances: Sequence[Distance]) -> Distance:
    """The largest movement of each figure, of distances from one reading."""
    names = dict.fromkeys(name for each in distances for name in each.gradients)
    return Distance(
        loss=min((each.loss for each in distances), key=_order),
        outputs=min((each.outputs for each in distances), key=_order),
        gradients={
            name: min((d.gradients[name] for d in distances if name in d.gradients), key=_order) for name in names
        },
        missing=tuple(sorted({name for each in distances for name in each.missing})),
    )


def judge(measured: Distance, limits: Gate, rounding: Distance | None) -> Decision:
    """Whether a changed model is near enough.

    Args:
        measured: From the unchanged model to the changed one.
        limits: See ``validation.gates``.
        rounding: From the unchanged model to itself with rounding noise; it widens limits by ``limits.spreads``. Where
            those are 0, what is nothing but noise is not judged.
    """
    if measured.missing:
        return Rejected("gate", f"{', '.join(measured.missing[:3])} differ in whether there is a value")
    allowance = None if rounding is None or not limits.spreads else 20 * _log10(limits.spreads)
    checks = [("loss", measured.loss, limits.output_db, None if rounding is None else rounding.loss)]
    checks.append(("outputs", measured.outputs, limits.output_db, None if rounding is None else rounding.outputs))
    noise = set() if allowance is not None or rounding is None else _noise(rounding)
    for name, value in measured.gradients.items():
        own = None if rounding is None else rounding.gradients.get(name)
        if name not in noise:
            checks.append((f"gradient of {name}", value, limits.gradient_db, own))
    # Loss and outputs share their noise: a loss may agree by chance, so its limit is never above that of the outputs.
    for what, value, needed, own in checks:
        least = needed if allowance is None or own is None else min(needed, own - allowance)
        if what == "loss" and allowance is not None and rounding is not None:
            least = min(least, rounding.outputs - allowance)
        if not value >= least:
            return Rejected("gate", f"{what} has {value:.1f} dB, and {least:.1f} are needed")
    if allowance is None and not measured.median_gradient >= limits.median_gradient_db:
        least = limits.median_gradient_db
        return Rejected("gate", f"the median gradient has {measured.median_gradient:.1f} dB, and {least} are needed")
    judged = {name: value for name, value in measured.gradients.items() if name not in noise}
    name, worst = replace(measured, gradients=judged).worst
    return Accepted("gate", f"outputs {measured.outputs:.1f} dB, gradients {worst:.1f} dB and better ({name})")


def _noise(rounding: Distance) -> set[str]:
    """Gradients that rounding alone moves by a tenth, or a thousand times as much as most others.

    Their true value is zero, as of a bias of keys, which softmax cancels, or of a bias before batch norm. In fewer bits
    this noise is larger, and says nothing.
    """
    least = max(20.0, min(rounding.median_gradient, _EXACT_DB) - 60.0)
    return {name for name, own in rounding.gradients.items() if own < least}


def _db(exact: Tensor, other: Tensor) -> float:
    finite = torch.isfinite(exact)
    if not bool(finite.all()) or not bool(torch.isfinite(other).all()):
        # Such as scores that a mask has set to minus infinity: they must be the same, and the rest is compared.
        odd, odd_too = exact[~finite], other[~finite]
        same = torch.equal(odd.nan_to_num(), odd_too.nan_to_num()) and torch.equal(odd.isnan(), odd_too.isnan())
        if not same or not bool(torch.isfinite(other[finite]).all()):
            return float("-inf")
        exact, other = exact[finite], other[finite]
    if not bool(exact.any()):
        return float("inf") if not bool(other.any()) else float("-inf")
    return sqnr_db(exact, other)


def _order(value: float) -> float:
    return float("-inf") if value != value else value


def _log10(value: float) -> float:
    return float(torch.log10(torch.tensor(value, dtype=torch.float64)))

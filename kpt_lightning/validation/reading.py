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
        outputs: Of each output, by place.
        gradients: Of each gradient, by parameter. A figure is NaN where one side alone holds NaN or infinities, and
            minus infinity where the exact tensor is zero and the other is not.
        missing: Parameters that have a gradient in one reading alone, and outputs that do not match.
    """

    loss: float
    outputs: dict[str, float]
    gradients: dict[str, float]
    missing: tuple[str, ...]

    @property
    def worst(self) -> tuple[str, float]:
        """The worst gradient and its figure."""
        return _least(self.gradients)

    @property
    def worst_output(self) -> tuple[str, float]:
        """The worst output and its figure."""
        return _least(self.outputs)

    @property
    def middle_output(self) -> float:
        """The median over the outputs that have a figure; of two in the middle the nearer one."""
        ordered = sorted(value for value in self.outputs.values() if value > float("-inf"))
        return ordered[len(ordered) // 2] if ordered else float("inf")

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
    outputs = {
        place: _db(exact.outputs[place], other.outputs[place]) for place in sorted(shared) if place not in unlike
    }
    gradients = {
        name: _db(one, two)
        for name, one in exact.gradients.items()
        if one is not None and (two := other.gradients.get(name)) is not None
    }
    loss = _db(torch.tensor([exact.loss], dtype=torch.float64), torch.tensor([other.loss], dtype=torch.float64))
    return Distance(loss, outputs, gradients, tuple(sorted(missing)))


def widest(distances: Sequence[Distance]) -> Distance:
    """The largest movement of each figure, of distances from one reading."""
    return Distance(
        loss=min((each.loss for each in distances), key=_order),
        outputs=_lowest([each.outputs for each in distances]),
        gradients=_lowest([each.gradients for each in distances]),
        missing=tuple(sorted({name for each in distances for name in each.missing})),
    )


@dataclass(frozen=True, slots=True)
class Expected:
    """What a change to fewer bits should do.

    Attributes:
        moved: From the unchanged model to itself with noise of the size of those bits.
        one_db: SQNR of one rounding to them; no figure needs more.
        spreads: How many times that far a right change may be.
    """

    moved: Distance
    one_db: float
    spreads: float

    def least(self, floor: float, own: float) -> float:
        """What a figure needs that the noise takes to ``own``: never less than ``floor``."""
        return max(floor, min(self.one_db, _order(own) - 20 * _log10(self.spreads)))


def judge(measured: Distance, limits: Gate, rounding: Distance | None, expected: Expected | None = None) -> Decision:
    """Whether a changed model is near enough.

    Args:
        measured: From the unchanged model to the changed one.
        limits: See ``validation.gates``.
        rounding: From the unchanged model to itself with rounding noise; it widens the limit of each figure by
            ``limits.spreads``. Where those are 0, what is nothing but noise is not judged. Nor is a figure that noise
            alone takes from zero to something; the verdict names it.
        expected: Raises the limits of a change to fewer bits to what such bits give.
    """
    if measured.missing:
        return Rejected("gate", f"{', '.join(measured.missing[:3])} differ in whether there is a value")
    checks = _checks(measured, limits, rounding)
    if expected is not None:
        checks = [replace(each, least=_expected_of(each, expected)) for each in checks]
    unjudged = [each.what for each in checks if each.own == float("-inf") and each.value == each.value]
    judged = [each for each in checks if each.what not in unjudged]
    if not judged:
        return Rejected(
            "gate", f"noise alone moves {', '.join(unjudged[:3])} from zero, and nothing else can be judged"
        )
    for each in judged:
        if not each.value >= each.least:
            return Rejected("gate", f"{each.what} has {each.value:.1f} dB, and {each.least:.1f} are needed")
    median_limit = limits.median_gradient_db
    if expected is not None:
        median_limit = expected.least(median_limit, expected.moved.median_gradient)
    if not limits.spreads and not measured.median_gradient >= median_limit:
        return Rejected(
            "gate", f"the median gradient has {measured.median_gradient:.1f} dB, and {median_limit:.1f} are needed"
        )
    gradients = {each.name: each.value for each in judged if each.kind == "gradient of "}
    name, worst = _least(gradients)
    output = _least({each.name: each.value for each in judged if each.kind == "output "})[1]
    text = f"outputs {output:.1f} dB, gradients {worst:.1f} dB and better ({name})"
    return Accepted("gate", text + (f"; not judged: {', '.join(unjudged[:3])}" if unjudged else ""))


@dataclass(frozen=True, slots=True)
class _Check:
    """One figure, what noise alone does to it, and what it must reach."""

    kind: str
    name: str
    value: float
    own: float | None
    least: float

    @property
    def what(self) -> str:
        return f"{self.kind}{self.name}"


def _checks(measured: Distance, limits: Gate, rounding: Distance | None) -> list[_Check]:
    allowance = None if rounding is None or not limits.spreads else 20 * _log10(limits.spreads)

    def check(kind: str, name: str, value: float, needed: float, own: float | None) -> _Check:
        # NaN first: noise that gave no number widens nothing.
        least = needed if allowance is None or own is None else min(needed, own - allowance)
        return _Check(kind, name, value, own, least)

    loss = check("loss", "", measured.loss, limits.output_db, None if rounding is None else rounding.loss)
    if allowance is not None and rounding is not None:
        # Loss and outputs share their noise: a loss may agree by chance.
        loss = replace(loss, least=min(loss.least, rounding.middle_output - allowance))
    noise = set() if limits.spreads or rounding is None else _noise(rounding)
    outputs, gradients = ({}, {}) if rounding is None else (rounding.outputs, rounding.gradients)
    return [
        loss,
        *(check("output ", at, value, limits.output_db, outputs.get(at)) for at, value in measured.outputs.items()),
        *(
            check("gradient of ", name, value, limits.gradient_db, gradients.get(name))
            for name, value in measured.gradients.items()
            if name not in noise
        ),
    ]


def _expected_of(check: _Check, expected: Expected) -> float:
    moved = expected.moved
    if check.kind == "loss":
        return expected.least(check.least, min(moved.loss, moved.middle_output, key=_order))
    figures = moved.outputs if check.kind == "output " else moved.gradients
    return expected.least(check.least, figures.get(check.name, float("-inf")))


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
            return float("nan")
        exact, other = exact[finite], other[finite]
    if not bool(exact.any()):
        return float("inf") if not bool(other.any()) else float("-inf")
    return sqnr_db(exact, other)


def _lowest(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in figures for name in each)
    return {name: min((each[name] for each in figures if name in each), key=_order) for name in names}


def _least(figures: dict[str, float]) -> tuple[str, float]:
    return min(figures.items(), key=lambda item: _order(item[1]), default=("", float("inf")))


def _order(value: float) -> float:
    return float("-inf") if value != value else value


def _log10(value: float) -> float:
    return float(torch.log10(torch.tensor(value, dtype=torch.float64)))

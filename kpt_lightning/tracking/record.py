"""What one training run left behind: a key, an environment and metrics, as data."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from kpt_lightning.errors import HistoryError
from kpt_lightning.measure import statistics

STATUSES = ("finished", "interrupted", "failed")

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Levels of :attr:`Metric.quantiles`: the middle half and the middle nine tenths of the steps, and their median."""

QUANTILE_DIGITS = 6
"""Significant digits that are stored of a quantile: enough to draw it and to say it, and the record stays small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric of one run: a robust summary, never a mean.

    Attributes:
        median: The value.
        unit: "s", "tokens/s", "samples/s", "bytes", "1" and so on.
        better: "lower" or "higher".
        n: Steps summarized; 1 for a value that a run has only once.
        n_effective: Independent steps that these are worth (see ``statistics.effective_size``).
        mad: Median absolute deviation over the steps, unscaled; None below two steps.
        quantiles: Of the steps, at the levels :data:`QUANTILES`; None below two steps and in records of older versions.
    """

    median: float
    unit: str
    better: str
    n: int = 1
    n_effective: float = 1.0
    mad: float | None = None
    quantiles: tuple[float, ...] | None = None

    @property
    def spread(self) -> float | None:
        """Robust relative spread of the steps, ``1.4826 MAD / |median|``; None below two steps or at zero."""
        return None if self.mad is None or not self.median else statistics.MAD_TO_SIGMA * self.mad / abs(self.median)

    @classmethod
    def of(cls, values: Sequence[float], unit: str, better: str) -> "Metric | None":
        """Summarize the steps of a run, None where there are none."""
        center = statistics.median(values)
        if center is None:
            return None
        n_effective = statistics.effective_size(values)
        return cls(
            median=center, unit=unit, better=better, n=len(values), n_effective=n_effective,
            mad=statistics.mad(values), quantiles=_quantiles(values),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The metric as JSON-like data; without quantiles as versions wrote it that did not know them."""
        data = asdict(self)
        if self.quantiles is None:
            del data["quantiles"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Metric":
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: A field is missing or unknown.
            ValueError: The quantiles are not one for each level, ascending.
        """
        found = cls(**data)
        if found.quantiles is None:
            return found
        if len(found.quantiles) != len(QUANTILES) or any(low > high for low, high in pairwise(found.quantiles)):
            raise ValueError(f"quantiles={found.quantiles!r}: must be {len(QUANTILES)} ascending numbers")
        return replace(found, quantiles=tuple(found.quantiles))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunKey:
    """What must be equal before two runs may be compared.

    Attributes:
        name: The user's label, the class of the model by default.
        model: Fingerprint of the model's structure.
        config: Fingerprint of batch shape, accumulation and what the user added.
        device: Name of the device.
        device_count: Processes that trained together.
        strategy: Class of the strategy.
        precision: Precision string of the trainer.
    """

    name: str
    model: str
    config: str
    device: str
    device_count: int
    strategy: str
    precision: str

    @property
    def digest(self) -> str:
        """A stable short hash of all fields."""
        return digest(asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run. Everything in it is JSON-like.

    Attributes:
        run_id: Unique.
        created_at: UTC time of the end of the run, ISO 8601.
        key: See :class:`RunKey`.
        status: One of :data:`STATUSES`; only finished runs are compared.
        metrics: Name to :class:`Metric`.
        environment: Versions, host and commit.
        loss_at: Step to loss, at fixed steps that runs share.
        loss_finite: Whether every loss was finite; None where it was not looked at.
        details: How things were measured: clock, warm-up, peak rate, config in plain text.
        notes: What a reader must know, such as a warm-up that had to shrink.
        plan: The optimization plan, None where none was given.
    """

    run_id: str
    created_at: str
    key: RunKey
    status: str
    metrics: Mapping[str, Metric]
    environment: Mapping[str, str]
    loss_at: Mapping[int, float] = field(default_factory=dict)
    loss_finite: bool | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    plan: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-like data."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        data["key"] = asdict(self.key)
        data["metrics"] = {name: metric.to_dict() for name, metric in self.metrics.items()}
        data["loss_at"] = {str(step): loss for step, loss in self.loss_at.items()}
        data["notes"] = list(self.notes)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RunRecord":
        """The inverse of :meth:`to_dict`.

        Raises:
            HistoryError: A key is missing or unknown.
        """
        values = dict(data)
        try:
            values["key"] = RunKey(**values["key"])
            values["metrics"] = {name: Metric.from_dict(metric) for name, metric in values["metrics"].items()}
            values["loss_at"] = {int(step): loss for step, loss in values["loss_at"].items()}
            values["notes"] = tuple(values["notes"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise HistoryError(
                f"run={data.get('run_id')!r}: its record does not have the form of this version ({error!r}). "
                "Read it with the version of kpt-lightning that wrote it."
            ) from error


def digest(data: Any) -> str:
    """The first 16 hex digits of SHA-256 over sorted JSON: equal on every machine and in every process."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _quantiles(values: Sequence[float]) -> tuple[float, ...] | None:
    """At the levels :data:`QUANTILES`, rounded; None below two values, or where one has no finite quantile."""
    if len(values) < 2:
        return None
    ordered = sorted(values)
    found = [statistics.quantile(ordered, level) or 0.0 for level in QUANTILES]
    if not all(math.isfinite(each) for each in found):
        return None
    return tuple(float(f"{each:.{QUANTILE_DIGITS}g}") for each in found)

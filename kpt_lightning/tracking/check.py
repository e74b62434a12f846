"""The newest runs of each key against those before them, or against pinned ones: what a build asks."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from kpt_lightning.measure import statistics
from kpt_lightning.tracking.acks import Ack, AckEnd, rank
from kpt_lightning.tracking.baselines import Baseline
from kpt_lightning.tracking.differences import environment_changes
from kpt_lightning.tracking.events import utc_now
from kpt_lightning.tracking.gate import FEWEST_TO_CUT, Verdict, compare
from kpt_lightning.tracking.record import Metric, RunKey, RunRecord
from kpt_lightning.tracking.reference import reference
from kpt_lightning.tracking.severity import DEFAULT_LIMITS, SeverityLimits
from kpt_lightning.tracking.thresholds import GATE_FEWEST_RUNS


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One metric of one key.

    Attributes:
        key: Of the runs.
        metric: Its name.
        unit: Of both levels.
        before: Median of the runs that were compared with; None where there are none.
        now: Median of the new runs; None where the newest run lacks the metric, which earlier ones had.
        verdict: What they show; None where there is no run to compare with, or nothing to compare.
        note: What a reader must know, such as an environment that changed; empty otherwise.
        baseline: Name of the baseline whose pinned runs were compared with; empty for the runs before.
        base_runs: Ids of the runs that the verdict is by, oldest first.
        new_runs: Ids of the runs that were judged, oldest first.
        acknowledged: The live acknowledgement of this regression, which then fails nothing; None without one.
        ended: An acknowledgement that these runs end, and how; None where they end none.
        since: Id of the first run at a worse level that stands since before the new runs; empty where there is none.
    """

    key: RunKey
    metric: str
    unit: str
    before: float | None
    now: float | None
    verdict: Verdict | None
    note: str = ""
    baseline: str = ""
    base_runs: tuple[str, ...] = ()
    new_runs: tuple[str, ...] = ()
    acknowledged: Ack | None = None
    ended: tuple[Ack, AckEnd] | None = None
    since: str = ""

    @property
    def missing(self) -> bool:
        """Whether the newest run lacks the metric."""
        return self.now is None

    @property
    def judged(self) -> bool:
        """Whether there was enough to compare with."""
        return self.verdict is not None and self.verdict.interval.finite

    @property
    def regressed(self) -> bool:
        """Whether the new runs are worse, acknowledged or not."""
        return self.verdict is not None and self.verdict.outcome == "regression"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """The runs of one key: all finished ones, the base, the new ones."""

    runs: Sequence[RunRecord]
    base: Sequence[RunRecord]
    newer: Sequence[RunRecord]
    note: str
    baseline: str
    limits: SeverityLimits
    now: datetime
    accepted: Collection[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """The runs that one metric is judged by: the base, those at a worse level that stands, the new ones."""

    base: Sequence[RunRecord]
    standing: Sequence[RunRecord]
    newer: Sequence[RunRecord]


def check_runs(
    records: Sequence[RunRecord], *, new: int = 1, metrics: Collection[str] | None = None,
    limits: SeverityLimits = DEFAULT_LIMITS, baseline: str | None = None,
    pins: Mapping[str, Baseline] | None = None, acks: Sequence[Ack] = (), now: datetime | None = None,
    accepted: Collection[str] | None = None,
) -> list[Checked]:  # fmt: skip
    """Judge the newest runs of each key, metric by metric; metrics that only earlier runs have are told too.

    Only finished runs count. Runs in another environment than the newest one (anything but the commit) are left out and
    told: a change of torch or of a driver begins a new base. Nothing is stored: :func:`.review.review` does that.

    Args:
        records: A history, oldest first.
        new: How many runs of each key are the new ones.
        metrics: Names; all that the newest run has if not given.
        limits: Of the severities.
        baseline: Name of the baseline to judge by; the runs before the new ones if not given.
        pins: Of that name: key digest to its pin, see :func:`.baselines.pinned`. A key without one has no verdict.
        acks: Acknowledgements; those that are not live are passed over.
        now: Aware time by which they expire; the present if not given.
        accepted: Ids of runs that somebody accepted, see :func:`.baselines.accepted_runs`. With them (an empty
            collection will do) a loss stands until it is accepted, see :func:`.reference.reference`; without, and with
            ``baseline``, the runs before the new ones are the base, whatever they show.

    Raises:
        ValueError: ``new`` is less than 1.
    """
    if new < 1:
        raise ValueError(f"new={new!r}: must be 1 or more, the number of runs to judge.")
    now = now or utc_now()
    live = {(ack.key_digest, ack.metric): ack for ack in acks if ack.state(now) == "live"}
    found = []
    for key_digest, runs in finished_by_key(records).items():
        newer = runs[-new:]
        if baseline is None:
            older, note = runs[:-new], ""
        else:
            older, note = _pinned_runs(runs, newer, baseline, (pins or {}).get(key_digest))
        alike = [run for run in older if not environment_changes(run, newer[-1])]
        if len(alike) < len(older):
            note = "; ".join(filter(None, (note, _what_changed(older, newer[-1]))))
        question = _Question(
            runs=runs, base=alike, newer=newer, note=note, baseline=baseline or "", limits=limits, now=now,
            accepted=accepted if baseline is None else None,
        )  # fmt: skip
        names = [name for name in newer[-1].metrics if metrics is None or name in metrics]
        found += [_checked(question, name, live.get((key_digest, name))) for name in names]
        found += _missing(question, metrics)
    return found


def finished_by_key(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Key digest to its finished runs, oldest first."""
    by_key: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.status == "finished":
            by_key.setdefault(record.key.digest, []).append(record)
    return by_key


def _pinned_runs(
    runs: Sequence[RunRecord], newer: Sequence[RunRecord], name: str, pin: Baseline | None
) -> tuple[list[RunRecord], str]:
    if pin is None:
        return [], f"no run of this key is pinned as {name!r}; pin some with kpt regress accept --name {name}"
    pinned = set(pin.run_ids)
    both = sum(run.run_id in pinned for run in newer)
    note = f"{both} of the {len(newer)} newest runs are pinned as {name!r} themselves" if both else ""
    return [run for run in runs if run.run_id in pinned], note


def _checked(question: _Question, name: str, ack: Ack | None) -> Checked:
    newest, notes = question.newer[-1].metrics[name], [question.note] if question.note else []
    sides = _sides(question, name, newest)
    if len(_alike(question.base, name, newest)) < sum(name in run.metrics for run in question.base):
        notes.append(f"only runs with {name} in {newest.unit!r}, {newest.better} is better, are compared with")
    verdict = _felt(_verdict_of(sides, name, newest, question.limits), sides, name, question)
    acknowledged, ended = _by_ack(question, name, verdict, ack) if ack is not None else (None, None)
    base = sides.base
    if acknowledged is not None and (further := _further_loss(sides, name, newest, question.limits)) is not None:
        verdict, acknowledged, base = further, None, sides.standing
        notes.append("worse than what was acknowledged, which is what it is compared with")
    return Checked(
        key=question.newer[-1].key, metric=name, unit=newest.unit, before=statistics.median(_values(base, name)),
        now=statistics.median(_values(sides.newer, name)), verdict=verdict, note="; ".join(notes),
        baseline=question.baseline,
        base_runs=tuple(run.run_id for run in base[len(base) - (verdict.baseline_runs if verdict else 0) :]),
        new_runs=tuple(run.run_id for run in sides.newer), acknowledged=acknowledged, ended=ended,
        since=sides.standing[0].run_id if sides.standing and base is sides.base else "",
    )  # fmt: skip


def _sides(question: _Question, name: str, metric: Metric) -> _Sides:
    older, newer = (_alike(runs, name, metric) for runs in (question.base, question.newer))
    if question.accepted is None:
        return _Sides(base=older, standing=(), newer=newer)
    holds = reference(
        _values(older, name), accepted=[run.run_id in question.accepted for run in older],
        higher_is_better=metric.better == "higher", limits=question.limits,
    )  # fmt: skip
    standing = () if holds.since is None else older[holds.since :]
    return _Sides(base=[older[place] for place in holds.places], standing=standing, newer=newer)


def _verdict_of(sides: _Sides, name: str, metric: Metric, limits: SeverityLimits) -> Verdict | None:
    """Of the new runs; where they leave open whether a loss that stands is over, together with the last before them."""
    if not sides.base:
        return None
    base, now = _values(sides.base, name), _values(sides.newer, name)
    verdict = _verdict(base, now, metric, limits)
    few = FEWEST_TO_CUT - len(now)
    if few < 1 or verdict.outcome in ("pass", "improvement") or not _is_nearer(sides, name):
        return verdict
    together = _verdict(base, [*_values(sides.standing, name)[-few:], *now], metric, limits)
    worse = together.outcome == "regression" and rank(together.severity) > rank(verdict.severity)
    return together if worse else verdict


def _felt(verdict: Verdict | None, sides: _Sides, name: str, question: _Question) -> Verdict | None:
    """The verdict; twice the wait in a data loader is no loss where that is a thousandth of a step."""
    step = question.newer[-1].metrics.get("step_time")
    if verdict is None or verdict.outcome != "regression" or name != "data_wait" or step is None:
        return verdict
    before, now = (statistics.median(_values(runs, name)) for runs in (sides.base, sides.newer))
    if before is None or now is None or now - before >= question.limits.minor * step.median:
        return verdict
    reason = f"the longer wait is less than {question.limits.minor:.0%} of a step"
    return replace(verdict, outcome="pass", severity=None, reason=reason)


def _is_nearer(sides: _Sides, name: str) -> bool:
    """Whether the new runs are nearer to the level that stands than to the base: the run of a fix is not held back."""
    base, standing, now = (statistics.median(_values(runs, name)) for runs in (sides.base, sides.standing, sides.newer))
    if base is None or standing is None or now is None:
        return False
    return abs(now - standing) < abs(now - base)


def _further_loss(sides: _Sides, name: str, metric: Metric, limits: SeverityLimits) -> Verdict | None:
    """A certain loss against the runs at the level that was acknowledged; None where there is none."""
    if len(sides.standing) < GATE_FEWEST_RUNS:
        return None
    verdict = _verdict(_values(sides.standing, name), _values(sides.newer, name), metric, limits)
    return verdict if verdict.outcome == "regression" and verdict.severity is not None else None


def _missing(question: _Question, metrics: Collection[str] | None) -> Iterator[Checked]:
    """Metrics that most earlier runs have, or that were asked for, and the newest run lacks."""
    newest = question.newer[-1]
    having: dict[str, list[RunRecord]] = {}
    for run in question.base:
        for name in run.metrics.keys() - newest.metrics.keys():
            having.setdefault(name, []).append(run)
    for name in sorted(having):
        base = having[name]
        if (metrics is None and 2 * len(base) <= len(question.base)) or (metrics is not None and name not in metrics):
            continue
        unit = base[-1].metrics[name].unit
        yield Checked(
            key=newest.key, metric=name, unit=unit, baseline=question.baseline, now=None, verdict=None,
            before=statistics.median(_values([run for run in base if run.metrics[name].unit == unit], name)),
            note=f"the newest run does not have it, {len(base)} of {len(question.base)} runs before do",
            new_runs=tuple(run.run_id for run in question.newer),
        )  # fmt: skip


def _by_ack(
    question: _Question, name: str, verdict: Verdict | None, ack: Ack
) -> tuple[Ack | None, tuple[Ack, AckEnd] | None]:
    """The acknowledgement where it covers a regression, and what ends it.

    Recovery is judged by the runs from before the known regression: a slow level that has become the usual one is no
    recovery. Where these runs are of another environment, by the verdict as it is.
    """
    newest = question.newer[-1].metrics[name]
    base = set(ack.base_runs)
    old = [run for run in question.runs if run.run_id in base]
    old = [run for run in _alike(old, name, newest) if not environment_changes(run, question.newer[-1])]
    standing = verdict
    if len(old) >= GATE_FEWEST_RUNS:
        # What ended must exclude the loss that was known, where that is smaller than what a pass excludes.
        resolution = min(question.limits.moderate, abs(ack.shift)) or question.limits.moderate
        now = _values(_alike(question.newer, name, newest), name)
        standing = _verdict(_values(old, name), now, newest, question.limits, resolution)
    if standing is None or verdict is None:
        return None, None
    when, run_id = question.now.isoformat(timespec="milliseconds"), question.newer[-1].run_id
    if standing.outcome in ("pass", "improvement"):
        return None, (ack, AckEnd(kind="recovered", created_at=when, run_id=run_id))
    worst = max((each.severity for each in (standing, verdict) if each.outcome == "regression"), key=rank, default=None)
    if rank(worst) > rank(ack.severity):
        return None, (ack, AckEnd(kind="worsened", created_at=when, run_id=run_id))
    return (ack if verdict.outcome == "regression" else None), None


def _verdict(
    before: Sequence[float], now: Sequence[float], metric: Metric, limits: SeverityLimits,
    resolution: float | None = None,
) -> Verdict:  # fmt: skip
    higher = metric.better == "higher"
    return compare(before, now, higher_is_better=higher, limits=limits, resolution=resolution)


def _alike(runs: Sequence[RunRecord], name: str, metric: Metric) -> list[RunRecord]:
    """Runs that have the metric, in the same unit and direction."""
    kind = (metric.unit, metric.better)
    return [run for run in runs if name in run.metrics and (run.metrics[name].unit, run.metrics[name].better) == kind]


def _values(runs: Sequence[RunRecord], name: str) -> list[float]:
    return [run.metrics[name].median for run in runs]


def _what_changed(older: Sequence[RunRecord], newest: RunRecord) -> str:
    """The last change, in words."""
    found = next(changes for run in reversed(older) if (changes := environment_changes(run, newest)))
    text = ", ".join(f"{name} {then or 'none'} -> {now or 'none'}" for name, (then, now) in found.items())
    return f"only runs since the environment changed are compared with: {text}"

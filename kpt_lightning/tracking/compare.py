"""Is a new run slower than an older one, beyond the noise?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kpt_lightning.errors import ConfigError, KptError
from kpt_lightning.measure import statistics
from kpt_lightning.measure.statistics import Interval
from kpt_lightning.tracking.fingerprint import CODE_KEY
from kpt_lightning.tracking.record import Metric, RunRecord

RUN_NOISE = {
    "step_time": 0.013,
    "tokens_per_second": 0.013,
    "samples_per_second": 0.013,
    "mfu": 0.013,
    "peak_memory": 0.01,
}
"""Standard deviation between runs of the same thing, relative, where there is no history to estimate it from.

Times: 90 pairs of runs of one commit on H100 in Megatron-LM's golden values differ by -1.5 to +0.9 % (quartiles), which
is 1.3 % per run: https://github.com/NVIDIA/Megatron-LM/tree/main/tests/functional_tests/test_cases. Memory: a choice.
"""

CPU_NOISE = 0.10
"""The same for times on a CPU, which other processes share: a choice, as no public series is known."""

STEPWISE = frozenset({"step_time", "tokens_per_second", "samples_per_second", "mfu"})
"""Metrics with one value per step, so that the spread inside a run is known."""

JUDGED = (*RUN_NOISE, "final_loss")
HISTORY_NEEDED = 3
ROBUST_FROM = 6
WIDEST = 20.0
CONFIDENCE = 0.95

NEGLIGIBLE = 0.002
"""No interval is narrower than plus or minus this: a repeatable 0.1 % is nothing to act on."""


class RegressionError(KptError, RuntimeError):
    """A run is worse than its baseline beyond the noise."""


class RegressionWarning(UserWarning):
    """A run is worse than its baseline beyond the noise."""


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of two runs.

    Attributes:
        metric: Its name.
        baseline: Median of the older run.
        new: Median of the newer run.
        change: ``new / baseline - 1``.
        interval: 95 % interval of the change.
        verdict: "faster", "slower", "better", "worse", "same within noise", or "cannot tell: " and why.
    """

    metric: str
    baseline: float
    new: float
    change: float
    interval: Interval
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        baseline: The older run.
        new: The newer run.
        rows: The judged metrics.
        environment_changes: Name to (old, new) of everything but the commit; a verdict may be due to these.
        commits: (old, new) where the git commit changed.
        like_runs: Runs that the noise between runs was estimated from; 0 where the floor was used.
        problems: Findings outside the rows, such as a loss that is not finite any more.
    """

    baseline: RunRecord
    new: RunRecord
    rows: tuple[Row, ...]
    environment_changes: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    commits: tuple[str | None, str | None] | None = None
    like_runs: int = 0
    problems: tuple[str, ...] = ()

    @property
    def regressions(self) -> tuple[str, ...]:
        """What got worse, one clause each; empty where nothing did."""
        worse = [
            f"{r.metric} {r.verdict} by {abs(r.change):.1%}" for r in self.rows if r.verdict in ("slower", "worse")
        ]
        return (*worse, *self.problems)

    @property
    def regressed(self) -> bool:
        """Whether anything got worse beyond the noise."""
        return bool(self.regressions)


def compare_runs(
    baseline: RunRecord, new: RunRecord, history: Sequence[RunRecord] = (), *, resolution: float = 0.05
) -> Comparison:
    """Compare two runs of one key.

    The change of each metric gets a 95 % interval on the logarithm. Its width comes from the noise between runs, at
    least three like runs in ``history`` with the baseline's environment (standard deviation of the log medians,
    Student t), else :func:`noise_floor`; the spread inside each run, ``1.25 robust sigma / sqrt(effective steps)``, is
    added to the floor and bounds the estimate from below. A loss is judged from history only: nothing tells the
    spread of its seeds otherwise.

    Args:
        baseline: The older run.
        new: The newer run.
        history: Older runs; those of another key or environment are left out.
        resolution: Where nothing is found and the interval is wider than plus or minus this, the verdict is
            "cannot tell" and not "same".

    Raises:
        ConfigError: The runs have different keys.
    """
    if baseline.key != new.key:
        differ = [name for name in new.key.__slots__ if getattr(new.key, name) != getattr(baseline.key, name)]
        rule = f"the runs differ in {', '.join(differ)}"
        raise ConfigError("baseline", baseline.run_id, rule, "Compare runs of the same key, see RunStore.like")
    like = [
        run
        for run in history
        if run.key == new.key and environment_facts(run) == environment_facts(baseline) and run.run_id != new.run_id
    ]
    rows = [
        _row(
            name,
            baseline.metrics[name],
            new.metrics[name],
            [run.metrics[name] for run in like if name in run.metrics],
            noise_floor(baseline, name),
            resolution,
        )
        for name in JUDGED
        if name in baseline.metrics and name in new.metrics
    ]
    problems = ["a loss is not finite"] if new.loss_finite is False and baseline.loss_finite is not False else []
    commits = baseline.environment.get(CODE_KEY), new.environment.get(CODE_KEY)
    return Comparison(
        baseline=baseline,
        new=new,
        rows=tuple(rows),
        environment_changes=environment_changes(baseline, new),
        commits=commits if commits[0] != commits[1] else None,
        like_runs=len(like) if len(like) >= HISTORY_NEEDED else 0,
        problems=tuple(problems),
    )


def choose_baseline(history: Sequence[RunRecord]) -> RunRecord | None:
    """The newest run that had enough steady steps to be judged, else the newest; None without history."""
    least = statistics.values_needed(CONFIDENCE)
    long = [run for run in history if "step_time" in run.metrics and run.metrics["step_time"].n >= least]
    return next(reversed(long or list(history)), None)


def noise_floor(run: RunRecord, metric: str) -> float | None:
    """Relative standard deviation assumed between runs like this one, None where nothing is known."""
    on_cpu = run.details.get("device_type") == "cpu" and metric in STEPWISE
    return CPU_NOISE if on_cpu else RUN_NOISE.get(metric)


def environment_facts(run: RunRecord) -> dict[str, str]:
    """What surrounds the code: everything but the commit."""
    return {name: value for name, value in run.environment.items() if name != CODE_KEY}


def environment_changes(old: RunRecord, new: RunRecord) -> dict[str, tuple[str | None, str | None]]:
    """Name to (old, new) of everything but the commit that is not the same."""
    then, now = environment_facts(old), environment_facts(new)
    names = sorted(then.keys() | now.keys())
    return {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}


def _row(name: str, old: Metric, new: Metric, like: Sequence[Metric], floor: float | None, resolution: float) -> Row:
    change = new.median / old.median - 1 if old.median > 0 else math.nan
    spread = _spread(name, old, new, like, floor)
    if isinstance(spread, str):
        unknown = Interval(-math.inf, math.inf, CONFIDENCE, spread)
        return Row(name, old.median, new.median, change, unknown, f"cannot tell: {spread}")
    center = math.log(new.median / old.median)
    interval = Interval(math.expm1(center - spread), math.expm1(center + spread), CONFIDENCE)
    return Row(name, old.median, new.median, change, interval, _verdict(name, new.better, interval, resolution))


def _spread(name: str, old: Metric, new: Metric, like: Sequence[Metric], floor: float | None) -> float | str:
    """Half width of the interval of the log ratio, or why there is none."""
    if old.median <= 0 or new.median <= 0:
        return "a ratio needs positive values"
    within = 0.0
    if name in STEPWISE:
        least = statistics.values_needed(CONFIDENCE)
        if min(old.n, new.n) < least:
            return f"{min(old.n, new.n)} steady steps; at least {least} are needed"
        within = math.hypot(_median_error(old), _median_error(new))
    medians = [math.log(metric.median) for metric in like if metric.median > 0]
    if len(medians) >= HISTORY_NEEDED:
        sigma = _sigma_between(medians)
        t = statistics.t_quantile((1 + CONFIDENCE) / 2, len(medians) - 1)
        return min(max(t * max(math.sqrt(2) * sigma, within), NEGLIGIBLE), WIDEST)
    if floor is None:
        return f"its spread between runs is unknown; at least {HISTORY_NEEDED} like runs are needed"
    return statistics.normal_quantile((1 + CONFIDENCE) / 2) * math.hypot(within, math.sqrt(2) * floor)


def _sigma_between(medians: Sequence[float]) -> float:
    """Standard deviation of log medians; robust from six runs on, so that one spoiled run does not blind all later."""
    if len(medians) >= ROBUST_FROM:
        return statistics.robust_sigma(medians) or 0.0
    mean = math.fsum(medians) / len(medians)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in medians) / (len(medians) - 1))


def _median_error(metric: Metric) -> float:
    return statistics.MEDIAN_EFFICIENCY * (metric.spread or 0.0) / math.sqrt(metric.n_effective)


def _verdict(name: str, better: str, interval: Interval, resolution: float) -> str:
    good, bad = ("faster", "slower") if name in STEPWISE else ("better", "worse")
    if interval.low > 0:
        return good if better == "higher" else bad
    if interval.high < 0:
        return bad if better == "higher" else good
    if interval.half_width > 1:
        return "cannot tell: runs differ by more than a factor of two for reasons of their own"
    if interval.half_width > resolution:
        more = math.ceil((interval.half_width / resolution) ** 2)
        return f"cannot tell: noise of ±{interval.half_width:.0%}; needs about {more} runs of each"
    return "same within noise"

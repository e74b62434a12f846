import dataclasses
import random

import pytest

from kpt_lightning.errors import ConfigError
from kpt_lightning.tracking.compare import choose_baseline, compare_runs
from kpt_lightning.tracking.record import Metric, RunKey, RunRecord

KEY = RunKey(name="m", model="a", config="b", device="cpu", device_count=1, strategy="s", precision="32-true")
ENVIRONMENT = {"torch": "2.13", "host": "h", "git_commit": "c1"}


def run(step_time=0.1, *, run_id="r", n=200, spread=0.01, environment=ENVIRONMENT, **values):
    metrics = {
        "step_time": steps(step_time, "s", "lower", n, spread),
        "tokens_per_second": steps(1000 / step_time, "tokens/s", "higher", n, spread),
    }
    for name, value in values.items():
        metrics[name] = Metric(median=value, unit="1", better="lower")
    return RunRecord(
        run_id=run_id, created_at="2026-01-01", key=KEY, status="finished", metrics=metrics, environment=environment,
        loss_finite=True,
    )  # fmt: skip


def steps(median, unit, better, n, spread):
    return Metric(median=median, unit=unit, better=better, n=n, n_effective=n, mad=median * spread / 1.4826)


def verdicts(comparison):
    return {row.metric: row.verdict for row in comparison.rows}


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.1, "slower"), (0.9, "faster"), (1.0, "same within noise"), (1.02, "same within noise")]
)
def test_the_floor_of_3_7_percent_divides_a_change_from_noise(factor, verdict):
    comparison = compare_runs(run(), run(0.1 * factor))
    assert verdicts(comparison) == {"step_time": verdict, "tokens_per_second": verdict}
    row = comparison.rows[0]
    assert row.change == pytest.approx(factor - 1)
    assert row.interval.low < row.change < row.interval.high
    assert comparison.regressed == (verdict == "slower")


def test_the_interval_is_the_floor_and_the_spread_inside_the_runs_in_quadrature():
    comparison = compare_runs(run(spread=0.0), run(spread=0.0))
    assert comparison.rows[0].interval.high == pytest.approx(1.96 * 2**0.5 * 0.013, rel=0.05)
    wider = compare_runs(run(spread=0.2, n=50), run(spread=0.2, n=50))
    assert wider.rows[0].interval.high > 2 * comparison.rows[0].interval.high


def test_a_run_too_short_to_judge_is_no_baseline_while_there_is_a_longer_one():
    long, short = run(run_id="long"), run(run_id="short", n=2)
    assert choose_baseline([long, short]) is long
    assert choose_baseline([short]) is short
    assert choose_baseline([run(run_id="older"), long]) is long
    assert choose_baseline([]) is None


def test_a_cpu_has_a_wider_floor():
    old, new = (dataclasses.replace(run(time), details={"device_type": "cpu"}) for time in (0.1, 0.115))
    assert compare_runs(old, new).rows[0].verdict.startswith("cannot tell")
    assert compare_runs(run(0.1), run(0.115)).rows[0].verdict == "slower"


def test_wide_noise_is_cannot_tell_and_says_how_many_runs_would_do():
    row = compare_runs(run(spread=0.3, n=30), run(0.104, spread=0.3, n=30)).rows[0]
    assert row.verdict.startswith("cannot tell: noise of")
    assert "runs of each" in row.verdict


@pytest.mark.parametrize("n", [1, 5])
def test_too_few_steps_are_cannot_tell(n):
    row = compare_runs(run(n=n), run(0.2)).rows[0]
    assert row.verdict == f"cannot tell: {n} steady steps; at least 6 are needed"
    assert not row.interval.finite


def test_three_quiet_like_runs_narrow_the_interval_and_three_noisy_ones_widen_it():
    quiet = [run(0.1 * factor, run_id=str(factor), spread=0.001) for factor in (0.999, 1.0, 1.001)]
    noisy = [run(0.1 * factor, run_id=str(factor), spread=0.001) for factor in (0.9, 1.0, 1.1)]
    new = run(0.102, run_id="new", spread=0.001)
    assert compare_runs(quiet[-1], new, quiet).rows[0].verdict == "slower"
    assert compare_runs(quiet[-1], new, quiet).like_runs == 3
    assert compare_runs(quiet[-1], new, quiet[:2]).rows[0].verdict == "same within noise"
    assert compare_runs(quiet[-1], new, quiet[:2]).like_runs == 0
    assert compare_runs(noisy[1], run(0.12, run_id="new"), noisy).rows[0].verdict.startswith("cannot tell")


def test_one_spoiled_run_in_a_history_of_eight_does_not_blind():
    history = [run(0.1 * (1 + i / 1000), run_id=str(i)) for i in range(7)]
    history.insert(3, run(5.0, run_id="spoiled"))
    assert compare_runs(history[-1], run(0.11, run_id="new"), history).rows[0].verdict == "slower"


def test_a_repeated_run_is_rarely_called_changed():
    rng, alarms = random.Random(0), 0
    for _ in range(400):
        history = [run(0.1 * rng.lognormvariate(0, 0.013), run_id=str(index)) for index in range(6)]
        alarms += compare_runs(history[-2], history[-1], history[:-1]).regressed
        alarms += compare_runs(history[0], history[1]).regressed
    assert alarms / 800 <= 0.05


def test_a_changed_environment_is_named_and_its_runs_are_no_measure_of_noise():
    changed = {**ENVIRONMENT, "torch": "2.14", "git_commit": "c2"}
    others = [run(0.1 * f, run_id=str(f), environment=changed) for f in (0.8, 1.0, 1.2)]
    comparison = compare_runs(run(), run(0.12, run_id="new", environment=changed), others)
    assert comparison.environment_changes == {"torch": ("2.13", "2.14")}
    assert comparison.commits == ("c1", "c2")
    assert comparison.like_runs == 0
    assert comparison.rows[0].verdict == "slower"


def test_the_new_run_itself_is_no_part_of_the_history():
    new = run(run_id="new")
    assert compare_runs(run(), new, [run(run_id="1"), run(run_id="2"), new]).like_runs == 0


def test_a_loss_is_judged_only_from_history():
    assert "unknown" in compare_runs(run(final_loss=1.0), run(final_loss=2.0)).rows[-1].verdict
    history = [run(final_loss=value, run_id=str(value)) for value in (0.99, 1.0, 1.01)]
    assert compare_runs(history[1], run(final_loss=2.0, run_id="new"), history).rows[-1].verdict == "worse"


def test_equal_memory_in_all_runs_does_not_make_one_percent_of_a_percent_a_regression():
    history = [run(peak_memory=1e9, run_id=str(index)) for index in range(3)]
    assert verdicts(compare_runs(history[0], run(peak_memory=1.0001e9, run_id="n"), history))["peak_memory"] == (
        "same within noise"
    )
    assert verdicts(compare_runs(history[0], run(peak_memory=1.1e9, run_id="n"), history))["peak_memory"] == "worse"


def test_a_loss_that_is_not_finite_any_more_is_a_regression():
    bad = dataclasses.replace(run(), loss_finite=False)
    assert compare_runs(run(), bad).regressions == ("a loss is not finite",)
    assert not compare_runs(bad, bad).regressed


def test_runs_of_different_keys_are_refused_by_field():
    other = dataclasses.replace(run(), key=dataclasses.replace(KEY, precision="fp8"))
    with pytest.raises(ConfigError, match="precision"):
        compare_runs(run(), other)


def test_a_metric_of_only_one_run_or_without_a_ratio_is_not_judged():
    comparison = compare_runs(run(peak_memory=0.0), run(peak_memory=1.0, mfu=0.5))
    assert set(verdicts(comparison)) == {"step_time", "tokens_per_second", "peak_memory"}
    assert verdicts(comparison)["peak_memory"] == "cannot tell: a ratio needs positive values"


def test_astronomic_changes_do_not_overflow():
    history = [run(10.0**power, run_id=str(power)) for power in (-300, 0, 300)]
    assert compare_runs(history[1], run(run_id="n"), history).rows[0].verdict.startswith("cannot tell")

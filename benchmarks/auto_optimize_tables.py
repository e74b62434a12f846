"""Markdown of what bench_auto_optimize.py measured."""

import ast
import re
import statistics
from collections.abc import Sequence

from results_table import NOT_MEASURED, SPEED_COLUMNS, Run, by_variant, markdown, speed_rows, versions

from kpt_lightning.measure.statistics import values_needed
from kpt_lightning.optimize.plan import Plan

SLOWER = 0.99
"""A plan below this speed is slower than plain by more than 1 %."""

HELD = 0.9
"""Share of the repeats that a prediction interval has to hold."""


def cpu_table(runs: Sequence[Run]) -> str:
    """One row for each model and level, and the verdicts over all."""
    columns = (
        "model", "level", "plain ms", "plan", "trial s", "predicted", "measured again: median (range)",
        "inside the interval", "A/A: median (range)", "slower by more than 1 %: plan, A/A",
    )  # fmt: skip
    repeats = sum(len(run["repeats"]) for run in runs)
    rounds = sorted({each[which]["rounds"] for run in runs for each in run["repeats"] for which in ("plan", "plain")})
    loads = [run["load_before"] for run in runs] + [each["load"] for run in runs for each in run["repeats"]]
    return "\n\n".join([
        _heading("`auto_optimize` against the plain model", "cpu", runs[0]),
        "Speed is time of plain over time of the other: above 1 is faster. Each figure is the median of interleaved "
        f"rounds ({_span(rounds)} of them), n = {repeats} repeats with the plan and as many plain against plain (A/A). "
        "A step is one forward and backward pass, with the optimizer where the plan changes it. The interval is the "
        "plan's own, made before the repeats; where nothing is kept they are A/A as well. Load average "
        f"{min(loads):.2f} to {max(loads):.2f}.",
        markdown(columns, [_cpu_row(run) for run in runs]),
        "\n".join(_cpu_verdicts(runs)),
    ])  # fmt: skip


def _cpu_row(run: Run) -> list[str]:
    predicted = run["predicted"]
    inside = "no prediction" if predicted is None else f"{_held(run)} of {len(run['repeats'])}"
    text = "unchanged"
    if predicted is not None:
        text = f"{predicted['gain']:.3f} ({predicted['low']:.3f} to {predicted['high']:.3f})"
    changes = ", ".join(change["candidate"] for change in run["plan"]["changes"]) or "nothing kept"
    step = " (with optimizer)" if run["step"] == "with optimizer" else ""
    return [
        run["title"], run["level"], f"{run['plain_ms']:.0f}{step}", changes, f"{run['trial_seconds']:.0f}", text,
        _range(_ratios(run, "plan")), inside, _range(_ratios(run, "plain")),
        f"{_slower(run, 'plan')}, {_slower(run, 'plain')} of {len(run['repeats'])}",
    ]  # fmt: skip


def _cpu_verdicts(runs: Sequence[Run]) -> list[str]:
    predicted = [run for run in runs if run["predicted"] is not None]
    repeats = sum(len(run["repeats"]) for run in runs)
    noise = [ratio for run in runs for ratio in _ratios(run, "plain")]
    lines = []
    if predicted:
        all_of_them = sum(len(run["repeats"]) for run in predicted)
        enough = sum(_held(run) >= HELD * len(run["repeats"]) for run in predicted)
        lines.append(
            f"- The interval held {sum(map(_held, predicted))} of {all_of_them} repeats of {len(predicted)} plans, and "
            f"at least 9 of 10 in {enough} of these plans."
        )
    below = [run for run in runs if statistics.median(_ratios(run, "plan")) < SLOWER]
    lines.append(
        f"- Slower than plain by more than 1 %: {sum(_slower(run, 'plan') for run in runs)} of {repeats} repeats with "
        f"the plan, {sum(_slower(run, 'plain') for run in runs)} of {repeats} of A/A; by the median of its repeats "
        f"{len(below)} of {len(runs)} plans" + ("" if not below else f": {', '.join(map(_name, below))}") + "."
    )
    spread = [abs(ratio - 1) for ratio in noise]
    lines.append(f"- A/A noise: median {100 * statistics.median(spread):.2f} %, largest {100 * max(spread):.2f} %.")
    return lines


def _ratios(run: Run, which: str) -> list[float]:
    return [each[which]["ratio"] for each in run["repeats"]]


def _held(run: Run) -> int:
    return sum(run["predicted"]["low"] <= ratio <= run["predicted"]["high"] for ratio in _ratios(run, "plan"))


def _slower(run: Run, which: str) -> int:
    return sum(ratio < SLOWER for ratio in _ratios(run, which))


def _name(run: Run) -> str:
    return f"{run['model']} {run['level']}"


def _range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def null_table(runs: Sequence[Run]) -> str:
    """How many changes that are none were taken for a gain."""
    rows = []
    for run in runs:
        gains = [trial["gain"] for trial in run["trials"] if trial["gain"] is not None]
        full = [trial for trial in run["trials"] if trial["gain"] is not None and trial["low"] is not None]
        rows.append([
            run["title"], f"{run['step_ms']:.2f}", str(run["count"]), f"{len(run['passed'])}", f"{len(run['kept'])}",
            _range(gains), str(run["count"] - len(full)), f"{run['seconds']:.0f}",
        ])  # fmt: skip
    columns = (
        "model", "step ms", "no-ops", "won their trial", "in the final plan", "speed: median (range)",
        f"ended before round {values_needed()}", "s",
    )  # fmt: skip
    return "\n\n".join([
        _heading("Candidates that change nothing, through the same search", "null", runs[0]),
        "The goal is at most 5 of 100. Whoever loses each of the first rounds is not measured to the end.",
        markdown(columns, rows),
    ])  # fmt: skip


def gpu_table(runs: Sequence[Run]) -> str:
    """Speed of each variant, what its trial cost, and which attention ran."""
    first, groups = runs[0], by_variant(runs)
    rows = [
        [*cells, _trial_seconds(groups[variant]), _first_losses(groups[variant]), _attention(groups[variant])]
        for variant, cells in speed_rows(runs).items()
    ]
    columns = (*SPEED_COLUMNS, "trial s", "loss of steps 1, 2, 3", "attention that ran in one step")
    processes = _span(sorted({len(entries) for entries in groups.values()}))
    return "\n\n".join([
        _heading(f"Plain, by rules and by trial: shape {first['shape']}", "h200", first),
        f"{first['batch']} x {first['length']} random tokens a step, {first['steps']} steps a process, each "
        f"variant in turn in {processes} processes of its own. One late step of the last process of each variant is "
        "profiled and is an outlier that the median ignores. A trial runs before the first step and is in no figure "
        "but its own.",
        markdown(columns, rows),
        "\n".join(["Plans:", "", *_plans(groups)]),
    ])  # fmt: skip


def _trial_seconds(entries: Sequence[Run]) -> str:
    seconds = [entry["plan"]["seconds"] for entry in entries if entry["plan"] and entry["plan"]["seconds"]]
    return ", ".join(f"{each:.0f}" for each in seconds) or "no trial"


def _first_losses(entries: Sequence[Run]) -> str:
    return "; ".join(dict.fromkeys(", ".join(f"{loss:.4f}" for loss in entry["losses"][:3]) for entry in entries))


def _plans(groups: dict[str, list[Run]]) -> list[str]:
    lines = []
    for variant, entries in groups.items():
        summaries = (Plan.from_dict(entry["plan"]).summary() for entry in entries if entry["plan"])
        lines += [f"- {variant}: {summary}" for summary in dict.fromkeys(summaries)]
    return lines


def _attention(entries: Sequence[Run]) -> str:
    """torch's attention operators of a profiled step; else the kernels whose names tell."""
    for entry in reversed(entries):
        if entry["attention"]:
            return "; ".join(f"{count} x {describe_attention(text)}" for text, count in entry["attention"])
        kernels = [kernel for kernel in entry["kernels_ms"] if re.search(r"fmha|flash|flex|attention", kernel[0], re.I)]
        if kernels:
            return "; ".join(f"{count} x kernel {name[:60]}" for name, count, _ in kernels[:2])
    return NOT_MEASURED


# Places of the mask and of is_causal: https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/native_functions.yaml
_PLACES = {"cudnn": (3, 6), "efficient": (3, 6), "flash": (None, 4)}


def describe_attention(text: str) -> str:
    """A short form of one entry of train_variant.py, such as "cudnn, causal, no mask tensor"."""
    found = re.fullmatch(r"aten::_scaled_dot_product_(\w+?)_attention inputs (\[.*\]) values (\[.*\])", text)
    if found is None or found[1] not in _PLACES:
        return text
    shapes, values = ast.literal_eval(found[2]), ast.literal_eval(found[3])
    mask, causal = _PLACES[found[1]]
    shape = [] if mask is None else shapes[mask]
    said = f"mask tensor {' x '.join(map(str, shape))}" if shape else "no mask tensor"
    return f"{found[1]}, {'causal' if values[causal] else 'not causal'}, {said}"


def _heading(what: str, command: str, run: Run) -> str:
    place = run["environment"].get("device", "CPU")
    made = f"Made by `python benchmarks/bench_auto_optimize.py {command}`."
    return f"# {what}: {place}, {run['date']}\n\n{made} Versions and settings: {versions(run['environment'])}."

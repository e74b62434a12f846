"""What the benchmark scripts share: training in a fresh process, reading what was measured, tables and dated files."""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
POWER = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
NOT_MEASURED = "not measured"
SHOWN = ("torch", "python", "lightning", "transformers", "cuda", "cudnn", "triton", "driver")

Run = dict[str, Any]


def train(folder: Path, name: str, variant: str, *arguments: str) -> bool:
    """``train_variant.py`` in a fresh process; its clocks are read by nvidia-smi while it trains.

    Args:
        folder: Where its JSON and the clocks go.
        name: Stem of both files.
        variant: As train_variant.py knows it.
        *arguments: Further ones.

    Returns:
        Whether it went to its end; the last lines are printed either way.
    """
    with (folder / f"{name}.power.csv").open("w") as file:
        try:
            watch = subprocess.Popen(["nvidia-smi", POWER, "--format=csv,noheader,nounits", "-lms", "500"], stdout=file)
        except FileNotFoundError:
            watch = None
        try:
            out = ["--out", str(folder / f"{name}.json")]
            return fresh_process(name, "train_variant.py", "--variant", variant, *arguments, *out)
        finally:
            if watch is not None:
                watch.kill()
                watch.wait()


def fresh_process(name: str, script: str, *arguments: str) -> bool:
    """Run a script beside this one, and print the end of what it says."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).splitlines()
    print(f"== {name}", *lines[-2 if done.returncode == 0 else -15 :], sep="\n", flush=True)
    return done.returncode == 0


def load_runs(folder: Path, prefix: str) -> list[Run]:
    """What processes wrote into ``folder``, each with the stem of its file, its day and its clocks."""
    runs = []
    for path in sorted(folder.glob(f"{prefix}*.json")):
        day = date.fromtimestamp(path.stat().st_mtime).isoformat()
        power = {} if (found := _power(path.with_suffix(".power.csv"))) is None else {"power": found}
        runs.append({"date": day, **json.loads(path.read_text()), "file": path.stem, **power})
    return runs


def _power(path: Path) -> dict[str, float] | None:
    """Median SM clock and power over the busiest quarter of a run."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [line.split(", ") for line in lines if line.count(", ") == 3]
    busy = sorted(rows, key=lambda row: -float(row[2]))[: max(1, len(rows) // 4)]
    if not busy:
        return None
    clock, watts = (statistics.median(float(row[column]) for row in busy) for column in (0, 2))
    return {"sm_mhz": clock, "watts": watts, "samples": len(rows)}


def by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one variant together, in the order of the files."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["variant"], []).append(run)
    return groups


SPEED_COLUMNS = (
    "variant", "ms a step: median of each process", "spread of steps (10 to 90 %)", "tokens/s", "against plain",
    "peak GB", "SM MHz, W",
)  # fmt: skip


def speed_rows(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The cells of ``SPEED_COLUMNS`` for each variant; "plain" is what the others are held against."""
    groups = by_variant(runs)
    plain = _median_ms(groups.get("plain", ()))
    return {variant: [variant, *_speed(entries, plain), _clocks(entries[-1])] for variant, entries in groups.items()}


def _speed(entries: Sequence[Run], plain: float | None) -> list[str]:
    peaks = [entry["peak_gb"] for entry in entries if entry["peak_gb"] is not None]
    peak = f"{max(peaks):.1f}" if peaks else NOT_MEASURED
    median = _median_ms(entries)
    if median is None:
        return [NOT_MEASURED, "", "", "", peak]
    steps = sorted(value for entry in entries for value in entry["step_ms"])
    medians = ", ".join(f"{entry['median_ms']:.1f}" for entry in entries if "median_ms" in entry)
    tokens = entries[0]["batch"] * entries[0]["length"] / median * 1e3
    against = NOT_MEASURED if plain is None else f"{plain / median:.2f}x"
    low, high = steps[len(steps) // 10], steps[len(steps) * 9 // 10]
    return [f"{medians} (n = {len(steps)} steps)", f"{low:.1f} to {high:.1f}", f"{tokens:,.0f}", against, peak]


def _median_ms(entries: Sequence[Run]) -> float | None:
    medians = [entry["median_ms"] for entry in entries if "median_ms" in entry]
    return statistics.median(medians) if medians else None


def _clocks(entry: Run) -> str:
    power = entry.get("power")
    return NOT_MEASURED if power is None else f"{power['sm_mhz']:.0f}, {power['watts']:.0f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, *rows]
    cells = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]
    return "\n".join([cells[0], "|---" * len(columns) + "|", *cells[1:]])


def environment() -> dict[str, Any]:
    """Where this process runs."""
    from kpt_lightning.hardware import detect

    profile = detect()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "device": profile.primary.name, **{name: profile.versions[name] for name in SHOWN if name in profile.versions},
        "cores": profile.host.cores, "threads": torch.get_num_threads(), "commit": commit.stdout.strip() or "unknown",
    }  # fmt: skip


def versions(environment: dict[str, Any]) -> str:
    """What a run says of where it ran, but its device, as one clause."""
    return ", ".join(f"{name} {value}" for name, value in environment.items() if name != "device" and value is not None)


def write_dated(folder: Path, stem: str, device: str, runs: Sequence[Run], text: str) -> Path:
    """Write ``stem_device_date`` as Markdown and, with every number, as JSON.

    Returns:
        The path of the Markdown.
    """
    day = max(run["date"] for run in runs)
    name = f"{stem}_{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}_{day}"
    (folder / f"{name}.json").write_text(json.dumps({"date": day, "device": device, "runs": runs}, indent=1) + "\n")
    path = folder / f"{name}.md"
    path.write_text(text + "\n")
    return path

"""The same script with and without the launcher, and against Accelerate's own FP8; each run in a fresh process.

    python benchmarks/bench_huggingface.py --out results/            # 1B shape, 4 x 4096 random tokens
    python benchmarks/bench_huggingface.py --out results/ --report   # the table alone

Variants take turns, so that a drift of the clocks reaches all of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from results_table import HERE, versions

LAUNCH = ("-m", "kpt_lightning.launch", "--kpt-config")
# Name -> (kpt config, arguments of the script).
VARIANTS: dict[str, tuple[dict[str, Any] | None, tuple[str, ...]]] = {
    "raw-plain": (None, ("--loop", "raw")),
    "raw-compiled": (None, ("--loop", "raw", "--compile")),
    "raw-accelerate-fp8": (None, ("--loop", "raw", "--mixed-precision", "fp8", "--compile")),
    "raw-kpt": ({}, ("--loop", "raw")),
    "raw-kpt-aggressive": ({"level": "aggressive"}, ("--loop", "raw")),
    "trainer-plain": (None, ("--loop", "trainer")),
    "trainer-compiled": (None, ("--loop", "trainer", "--compile")),
    "trainer-kpt": ({}, ("--loop", "trainer")),
    "trainer-kpt-aggressive": ({"level": "aggressive"}, ("--loop", "trainer")),
}
SKIPPED = 8
"""First steps: compilation, proofs and their profile."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[*VARIANTS])
    parser.add_argument("--report", action="store_true")
    options, rest = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report:
        for turn in range(options.rounds):
            for name in options.only:
                run(options.out / f"{name}-{turn}.json", *VARIANTS[name], *rest)
    print(table(options.out))


def run(out: Path, config: dict[str, Any] | None, arguments: tuple[str, ...], *rest: str) -> None:
    """One process; what it says goes beside its figures."""
    launcher: tuple[str, ...] = ()
    if config is not None:
        file = out.with_suffix(".yaml")
        file.write_text(json.dumps(config))
        launcher = (*LAUNCH, str(file))
    script = [str(HERE / "huggingface_train.py"), *arguments, *rest, "--out", str(out)]
    done = subprocess.run([sys.executable, *launcher, *script], capture_output=True, text=True, check=False)
    out.with_suffix(".log").write_text(done.stdout + done.stderr)
    told = [line for line in done.stderr.splitlines() if line.startswith("kpt:")]
    print(f"== {out.stem}: exit {done.returncode}", *(told or done.stderr.splitlines()[-3:]), sep="\n", flush=True)


def table(folder: Path) -> str:
    """Markdown: medians over the steps of all rounds, against the plain run of the same loop."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*-?.json"))}
    if not runs:
        return "not measured"
    steps = {
        name: [each for stem, run in runs.items() if stem[:-2] == name for each in run["step_ms"][SKIPPED:]]
        for name in VARIANTS
    }
    first = next(iter(runs.values()))
    lines = [
        f"{first['shape']}, {first['batch']} x {first['length']} random tokens; {versions(first['environment'])}", "",
        "| variant | ms a step, median (10th to 90th percentile) | steps | tokens/s | against plain | peak GB |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, times in steps.items():
        if len(times) < 2:
            lines.append(f"| {name} | not measured | | | | |")
            continue
        middle, tenths = statistics.median(times), statistics.quantiles(times, n=10)
        plain = steps[f"{name.partition('-')[0]}-plain"]
        against = f"{statistics.median(plain) / middle:.2f}x" if plain else ""
        peaks = [run["peak_bytes"] for stem, run in runs.items() if stem[:-2] == name and run["peak_bytes"]]
        peak = f"{max(peaks) / 1e9:.1f}" if peaks else ""
        tokens = 1e3 * first["batch"] * first["length"] / middle
        lines.append(
            f"| {name} | {middle:.1f} ({tenths[0]:.1f} to {tenths[-1]:.1f}) | {len(times)} | {tokens:,.0f} | {against} "
            f"| {peak} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

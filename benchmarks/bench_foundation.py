"""Speed against plain Lightning and the best peer, loss on real text against bf16-mixed; each run in a fresh process.

    python benchmarks/bench_foundation.py speed --out results/   # 1B shape, 4 x 4096 random tokens
    python benchmarks/bench_foundation.py loss --out results/    # 1B shape, 4 x 1024 tokens of real text, 300 steps
    python benchmarks/bench_foundation.py report --out results/  # the table of both, as markdown

Variants take turns, so that a drift of the clocks reaches all of them. torchao is a peer and is skipped where absent.
"""

import argparse
import json
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SPEED = ("kpt", "plain", "torchao-bf16-true", "kpt-bf16-mixed", "plain-compiled-blocks")
LOSS = (
    ("plain", 0), ("kpt", 0), ("plain", 1), ("kpt-rowwise", 0), ("kpt-rowwise_with_gw_hp", 0), ("kpt-bf16-mixed", 0),
)  # fmt: skip
POWER = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "loss", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shape", default="1b")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "speed":
        for turn in range(options.rounds):
            for variant in SPEED:
                if variant.startswith("torchao") and find_spec("torchao") is None:
                    continue
                if variant in ("plain-compiled-blocks", "kpt-bf16-mixed") and turn:
                    continue
                extra = ["--profile"] if turn == options.rounds - 1 and variant in ("kpt", "plain") else []
                run(options, f"speed-{variant}-{turn}", variant, "--steps", "30", *extra)
    elif options.what == "loss":
        for variant, seed in LOSS:
            run(
                options, f"loss-{variant}-{seed}", variant, "--steps", "300", "--length", "1024", "--seed", str(seed),
                "--vocab-size", "32768", "--warmup", "50", "--text", str(options.out / "text" / "tokens.pt"),
            )  # fmt: skip
    else:
        print(report(options.out))


def run(options: argparse.Namespace, name: str, variant: str, *arguments: str) -> None:
    """One variant in a fresh process; its clocks are read by nvidia-smi while it trains."""
    log = options.out / f"{name}.power.csv"
    with log.open("w") as file:
        try:
            watch = subprocess.Popen(["nvidia-smi", POWER, "--format=csv,noheader,nounits", "-lms", "500"], stdout=file)
        except FileNotFoundError:
            watch = None
        try:
            command = [sys.executable, str(HERE / "train_variant.py"), "--variant", variant, "--shape", options.shape]
            out = ["--out", str(options.out / f"{name}.json")]
            done = subprocess.run([*command, *arguments, *out], capture_output=True, text=True, check=False)
        finally:
            if watch is not None:
                watch.kill()
    lines = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).splitlines()
    print(f"== {name}", *lines[-2 if done.returncode == 0 else -15 :], sep="\n", flush=True)


def report(folder: Path) -> str:
    """Markdown of everything that was measured into ``folder``."""
    runs = [json.loads(path.read_text()) | {"file": path.stem} for path in sorted(folder.glob("*.json"))]
    speed = [entry for entry in runs if entry["file"].startswith("speed-")]
    loss = [entry for entry in runs if entry["file"].startswith("loss-")]
    return "\n\n".join([_speed_table(speed, folder), _loss_table(loss)])


def _speed_table(runs: list[dict[str, Any]], folder: Path) -> str:
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for entry in runs:
        by_variant.setdefault(entry["variant"], []).append(entry)
    plain = statistics.median(entry["median_ms"] for entry in by_variant["plain"])
    lines = [
        "| variant | ms a step: median of each process | spread of steps (10 to 90 %) | tokens/s | against plain | "
        "peak GB | SM MHz, W |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, entries in by_variant.items():
        steps = sorted(value for entry in entries for value in entry["step_ms"])
        median = statistics.median(entry["median_ms"] for entry in entries)
        low, high = steps[len(steps) // 10], steps[len(steps) * 9 // 10]
        medians = ", ".join(f"{entry['median_ms']:.1f}" for entry in entries)
        tokens = entries[0]["batch"] * entries[0]["length"] / median * 1e3
        peak = max(entry["peak_gb"] for entry in entries)
        lines.append(
            f"| {variant} | {medians} (n = {len(steps)} steps) | {low:.1f} to {high:.1f} | {tokens:,.0f} | "
            f"{plain / median:.2f}x | {peak:.1f} | {_power(folder / (entries[-1]['file'] + '.power.csv'))} |"
        )
    return "\n".join(lines)


def _power(path: Path) -> str:
    """Median SM clock and power over the busiest quarter of the run."""
    rows = [line.split(", ") for line in path.read_text().splitlines() if line.count(", ") == 3]
    busy = sorted(rows, key=lambda row: -float(row[2]))[: max(1, len(rows) // 4)]
    if not busy:
        return "not measured"
    return f"{statistics.median(float(r[0]) for r in busy):.0f}, {statistics.median(float(r[2]) for r in busy):.0f}"


def _loss_table(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return "Loss: not measured"
    marks = (1, 25, 50, 100, 150, 200, 250, 300)
    lines = [
        "Mean training loss of the 10 steps up to each mark, and held-out loss after the last.",
        "",
        "| run | " + " | ".join(f"step {mark}" for mark in marks) + " | held out |",
        "|---" * (len(marks) + 2) + "|",
    ]
    for entry in runs:
        losses = entry["losses"]
        cells = [f"{statistics.fmean(losses[max(0, mark - 10) : mark]):.4f}" for mark in marks]
        lines.append(
            f"| {entry['variant']}, seed {entry['seed']} | {' | '.join(cells)} | {entry['held_out_loss']:.4f} |"
        )
    held = {(entry["variant"], entry["seed"]): entry["held_out_loss"] for entry in runs}
    if ("plain", 0) in held and ("plain", 1) in held:
        lines += ["", f"Gap of two bf16-mixed seeds, held out: {held['plain', 1] - held['plain', 0]:+.4f}."]
        lines += [
            f"Gap of {variant}, seed {seed}, to bf16-mixed of the same seed: {value - held['plain', seed]:+.4f}."
            for (variant, seed), value in held.items()
            if variant != "plain"
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

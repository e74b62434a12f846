"""Speed against plain Lightning and the best peer, loss on real text against bf16-mixed; each run in a fresh process.

    python benchmarks/bench_foundation.py speed --out results/   # 1B shape, 4 x 4096 random tokens
    python benchmarks/bench_foundation.py loss --out results/    # 1B shape, 4 x 1024 tokens of real text, 500 steps
    python benchmarks/bench_foundation.py report --out results/  # the table of both, as markdown

Variants take turns, so that a drift of the clocks reaches all of them. torchao is a peer and is skipped where absent.
"""

import argparse
import statistics
from importlib.util import find_spec
from pathlib import Path

from results_table import SPEED_COLUMNS, Run, load_runs, markdown, speed_rows, train

SPEED = ("kpt", "plain", "torchao-bf16-true", "kpt-bf16-mixed", "plain-compiled-blocks")
LOSS = (
    ("plain", 0), ("kpt-aggressive", 0), ("plain", 1), ("kpt", 0), ("kpt-rowwise", 0), ("kpt-rowwise_with_gw_hp", 0),
    ("kpt-bf16-mixed", 0),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "loss", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--steps", type=int, default=500, help="of a loss run")
    parser.add_argument("--first", type=int, default=len(LOSS), help="how many of the loss runs, in their order")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shape = ("--shape", options.shape)
    if options.what == "speed":
        for turn in range(options.rounds):
            for variant in SPEED:
                if variant.startswith("torchao") and find_spec("torchao") is None:
                    continue
                if variant in ("plain-compiled-blocks", "kpt-bf16-mixed") and turn:
                    continue
                extra = ["--profile"] if turn == options.rounds - 1 and variant in ("kpt", "plain") else []
                train(options.out, f"speed-{variant}-{turn}", variant, *shape, "--steps", "30", *extra)
    elif options.what == "loss":
        for variant, seed in LOSS[: options.first]:
            train(
                options.out, f"loss-{variant}-{seed}", variant, *shape, "--steps", str(options.steps),
                "--length", "1024", "--seed", str(seed), "--vocab-size", "32768", "--warmup", "50",
                "--text", str(options.out / "text" / "tokens.pt"),
            )  # fmt: skip
    else:
        print(report(options.out))


def report(folder: Path) -> str:
    """Markdown of everything that was measured into ``folder``."""
    speed = markdown(SPEED_COLUMNS, list(speed_rows(load_runs(folder, "speed-")).values()))
    return "\n\n".join([speed, _loss_table(load_runs(folder, "loss-"))])


def _loss_table(runs: list[Run]) -> str:
    if not runs:
        return "Loss: not measured"
    marks = [mark for mark in (1, 25, 50, 100, 150, 200, 250, 300, 400, 500) if mark <= runs[0]["steps"]]
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

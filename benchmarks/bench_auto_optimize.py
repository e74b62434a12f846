"""What auto-optimization gains, whether its predictions hold, and whether it ever takes noise for a gain.

    python benchmarks/bench_auto_optimize.py cpu --out r    # six models, two levels, each in a fresh process
    python benchmarks/bench_auto_optimize.py null --out r   # 100 candidates that change nothing
    python benchmarks/bench_auto_optimize.py h200 --out r   # Llama 1B on one GPU: plain, by rules, by trial
    python benchmarks/bench_auto_optimize.py report --out r # the tables of all that is in the folder, anew

Each writes its numbers into ``--out``, and a dated table with all of them as JSON. cpu wants a quiet machine. h200 can
be spread over several calls: ``--variants kpt-trial --first-turn 1`` adds a second process of that variant.
"""

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from auto_optimize_tables import cpu_table, gpu_table, null_table
from cpu_models import MODELS
from results_table import Run, fresh_process, load_runs, train, write_dated

VARIANTS = (
    "plain", "plain-bf16-true", "torchao-bf16-true", "torchao-bf16-mixed", "kpt", "kpt-aggressive", "kpt-true",
    "kpt-true-aggressive", "kpt-trial", "plain-trial", "user-compiled", "user-compiled-trial",
)  # fmt: skip
TABLES: dict[str, Callable[[list[Run]], str]] = {"cpu": cpu_table, "null": null_table, "h200": gpu_table}


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = {"cpu": cpu, "null": null, "h200": h200, "report": lambda _: []}[options.what](options)
    for kind in TABLES if options.what == "report" else (options.what,):
        report(options.out, kind)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def cpu(options: argparse.Namespace) -> list[str]:
    """Plan and measure each model; the names of the runs that failed."""
    failed = []
    for model in options.models:
        for level in options.levels:
            name = f"cpu-{model}-{level}"
            settings = ["--repeats", str(options.repeats), "--max-seconds", str(options.max_seconds)]
            out = ["--out", str(options.out / f"{name}.json")]
            if not fresh_process(name, "plan_gain.py", "--model", model, "--level", level, *settings, *out):
                failed.append(name)
    return failed


def null(options: argparse.Namespace) -> list[str]:
    """Search among no-ops in this process."""
    from no_op_candidates import measure

    report = measure(options.count, options.width, torch.device(options.device))
    (options.out / f"null-{options.device}.json").write_text(json.dumps(report, indent=1))
    return []


def h200(options: argparse.Namespace) -> list[str]:
    """Train the variants in turn, so that a drift of the clocks reaches all; the names of the runs that failed."""
    if options.shape != "tiny" and not torch.cuda.is_available():
        raise SystemExit("h200 needs an NVIDIA GPU, and torch sees none; --shape tiny tries the script out")
    shape = ["--shape", options.shape, "--batch", str(options.batch), "--length", str(options.length)]
    settings = ["--steps", str(options.steps), "--max-seconds", str(options.max_seconds)]
    last, failed = options.first_turn + options.processes - 1, []
    for turn in range(options.first_turn, last + 1):
        for variant in options.variants:
            if variant.startswith("torchao") and find_spec("torchao") is None:
                print(f"== {variant}: torchao is not installed, left out", flush=True)
                continue
            name, profile = f"h200-{variant}-{turn}", ["--profile"] * (turn == last and torch.cuda.is_available())
            if not train(options.out, name, variant, *shape, *settings, *profile):
                failed.append(name)
    return failed


def report(folder: Path, kind: str) -> None:
    """Write the table of one kind of runs, where there are any, and print it."""
    runs = load_runs(folder, f"{kind}-")
    order = {"cpu": [f"cpu-{model}" for model in MODELS], "h200": [f"h200-{variant}-" for variant in VARIANTS]}
    runs.sort(key=lambda run: next((i for i, start in enumerate(order.get(kind, ())) if _is(run, start)), 0))
    if runs:
        device = runs[0]["environment"].get("device", "cpu")
        print(write_dated(folder, f"auto_optimize_{kind}", device, runs, text := TABLES[kind](runs)), text, sep="\n\n")


def _is(run: Run, start: str) -> bool:
    # "h200-kpt-" begins "h200-kpt-trial-0" too.
    rest = run["file"].removeprefix(start)
    return rest != run["file"] and (start.startswith("cpu-") or rest.isdigit())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    each = {name: commands.add_parser(name) for name in (*TABLES, "report")}
    for command in each.values():
        command.add_argument("--out", type=Path, required=True)
    for name in ("cpu", "h200"):
        each[name].add_argument("--max-seconds", type=float, default=120.0, help="budget of a trial")
    each["cpu"].add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    levels = ("conservative", "balanced")
    each["cpu"].add_argument("--levels", nargs="+", choices=levels, default=levels)
    each["cpu"].add_argument("--repeats", type=int, default=10)
    each["null"].add_argument("--count", type=int, default=100)
    each["null"].add_argument("--width", type=int, default=512)
    each["null"].add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    each["h200"].add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    each["h200"].add_argument("--processes", type=int, default=2)
    each["h200"].add_argument("--first-turn", type=int, default=0, help="number of the first process")
    each["h200"].add_argument("--shape", default="1b")
    each["h200"].add_argument("--batch", type=int, default=4)
    each["h200"].add_argument("--length", type=int, default=4096)
    each["h200"].add_argument("--steps", type=int, default=30)
    return parser.parse_args()


if __name__ == "__main__":
    main()

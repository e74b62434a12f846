"""How far a short loss run falls, and whether it diverges, by the share of a weight that each step moves.

    python benchmarks/bench_loss_run.py --out r    # one H200; --shape tiny tries the script out anywhere

It is what ``kpt_lightning.validation.loss_run`` does in a trial, on the Llama of the other benchmarks: three seeds of
eight steps, in bf16 and in FP8. Writes a dated table, and every loss of every step as JSON.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from llama import SHAPES, CausalLM, random_loader
from results_table import environment, markdown, versions, write_dated

from kpt_lightning.config import Float8Config
from kpt_lightning.optimize.work import resample
from kpt_lightning.precision.convert import convert_to_float8, decide_layers, restore_linear
from kpt_lightning.validation import loss_run

SHARES = (None, 0.02, 0.01, 0.005, 0.0025)
PRECISIONS = ("bf16", "tensorwise", "rowwise_with_gw_hp")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [run for precision in PRECISIONS for run in measure(options, precision)]
    where = environment()
    for run in runs:
        run["environment"] = where
    text = table(runs, f"{options.batch} x {options.length} tokens, shape {options.shape}; {versions(where)}")
    print(write_dated(options.out, "loss_run", where["device"], runs, text), text, sep="\n\n")


def measure(options: argparse.Namespace, precision: str) -> Iterator[dict[str, Any]]:
    """Losses of all steps at each share, from the same fresh model."""
    torch._dynamo.reset()
    seed_everything(0)
    model = CausalLM(options.shape, 0.0).to(DEVICE).model
    vocabulary = SHAPES[options.shape]["vocab_size"]
    ids = next(iter(random_loader(vocabulary, options.batch, options.length, 1))).to(DEVICE)
    changed = []
    if precision != "bf16":
        config = Float8Config(recipe=precision, emulate=DEVICE == "cpu")
        names = [layer.subject for layer in decide_layers(model, config) if layer]
        changed = convert_to_float8(model, names, config)
    for block in model.model.layers:
        block.compile()
    for share in SHARES:
        seen: dict[int, list[float]] = {}

        def step(seed: int, number: int, seen: dict[int, list[float]] = seen) -> torch.Tensor:
            batch = ids if number == loss_run.STEPS else resample(ids, 1000 * seed + number)
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            seen.setdefault(seed, []).append(float(loss.detach()))
            return loss

        with fixed(share):
            last = loss_run.losses_after(model, step)
        print(precision, share, last, flush=True)
        yield {
            "date": date.today().isoformat(), "precision": precision, "layers": len(changed), "share": share,
            "losses": seen, "last": last,
        }  # fmt: skip
    restore_linear(changed)


@contextmanager
def fixed(share: float | None) -> Iterator[None]:
    """The same share for every tensor; None for what a trial takes."""
    before = loss_run._UPDATE, loss_run._SPECTRAL_UPDATE
    if share is not None:
        loss_run._UPDATE, loss_run._SPECTRAL_UPDATE = share, math.inf
    try:
        yield
    finally:
        loss_run._UPDATE, loss_run._SPECTRAL_UPDATE = before


def table(runs: list[dict[str, Any]], what: str) -> str:
    """One line for each share and precision; the fall is that of bf16 at the same share."""
    means = {(run["precision"], run["share"]): statistics.mean(run["last"]) for run in runs}
    rows = []
    for run in runs:
        start, plain = runs[0]["losses"][0][0], means["bf16", run["share"]]
        behind = (means[run["precision"], run["share"]] - plain) / (start - plain)
        highest = max(loss for losses in run["losses"].values() for loss in losses)
        share = "of a trial" if run["share"] is None else f"{run['share']:.2%}"
        last = ", ".join(f"{loss:.3f}" for loss in run["last"])
        rows.append([share, run["precision"], str(run["layers"]), last, f"{highest:.2f}", f"{behind:+.1%}"])
    rows.sort(key=lambda row: row[0])
    columns = ("share", "precision", "FP8 layers", "loss after 8 steps, by seed", "highest loss", "behind bf16")
    head = f"# Loss runs by the share of a weight that a step moves\n\n`python benchmarks/bench_loss_run.py`; {what}.\n"
    return f"{head}\n{markdown(columns, rows)}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()

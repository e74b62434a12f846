"""Fine-tune SmolLM2-135M with LoRA on this machine and say how it went. Run: make demo.

About three minutes on two CPU cores that do nothing else. A second run compares itself with the first, whose record
is in .kpt/runs.sqlite.
"""

import argparse
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from kpt_lightning import RegressionCallback
    from kpt_lightning.hardware import HardwareProfile
    from kpt_lightning.recipes.report import FineTuneResult

console = Console(highlight=False)


def arguments() -> dict[str, Any]:
    """Settings of the recipe from the command line; what is not given stays as the recipe has it."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, help="sequences in a step")
    parser.add_argument("--sequence-length", type=int, help="tokens in a sequence")
    parser.add_argument("--held-out-batches", type=int, help="batches that the held-out loss is the mean over")
    parser.add_argument("--warmup-steps", type=int, help="steps in which the learning rate rises")
    changes = vars(parser.parse_args())
    if "sequence_length" in changes:
        changes["data"] = {"sequence_length": changes.pop("sequence_length")}
    return changes


def prepare_process() -> None:
    """Settings of this process only, before torch is imported: no network, and no notes that are not about this run."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Where others use the cores too, threads that spin while they wait make a step ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")


def show_hardware(profile: "HardwareProfile") -> None:
    from kpt_lightning.hardware import features

    device = profile.primary
    table = Table(title=f"This machine: {device.name}, {device.memory_bytes / 2**30:.0f} GiB", title_justify="left")
    for column in ("", "feature", "why"):
        table.add_column(column, overflow="fold")
    for name in features.NAMES:
        decision = profile.supports(name)
        table.add_row("[green]yes[/]" if decision else "[yellow]no[/]", name, escape(decision.reason))
    console.print(table)


def show_result(result: "FineTuneResult", tracker: "RegressionCallback") -> None:
    from kpt_lightning.tracking import report

    record = tracker.record
    if record is None:
        raise SystemExit("No step ran, so there is no record.")
    speed, memory = record.metrics["tokens_per_second"], record.metrics["peak_memory"]
    console.print(f"\nRecord stored in {tracker.judge.store.place}:")
    console.print(report.record_table(record))
    if tracker.comparison is None:
        console.print("The first run like this: a second one compares itself with it.")
    else:
        console.print(report.conclusion_table(tracker.comparison))
        runs = tracker.comparison.earlier
        console.print(f"Compared with {runs} earlier run{'s' * (runs != 1)}; five are enough to judge by.")
    console.print(f"Held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f} nats a token.")
    console.print(
        f"Trained on {result.count:,} tokens at {speed.median:,.0f} tokens/s, "
        f"peak memory {report.show_value(memory.median, memory.unit)}."
    )


def main() -> None:
    changes = arguments()
    console.print("Fine-tuning SmolLM2-135M on the sources of Python's standard library. Importing torch ...")
    prepare_process()
    from kpt_lightning import KptStrategy, RegressionCallback
    from kpt_lightning.hardware import detect
    from kpt_lightning.recipes.lightning_run import fine_tune
    from kpt_lightning.recipes.registry import default_config
    from kpt_lightning.recipes.report import to_terminal

    # Lightning sets its level when it is imported.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    show_hardware(detect())
    config = default_config("causal-lm-lora", **changes)
    tracker = RegressionCallback(
        name="SmolLM2-135M LoRA", config=config.model_dump(mode="json"), on_regression="ignore", print_report=False
    )
    result = fine_tune(config, strategy=KptStrategy(), callbacks=[tracker], say=to_terminal)
    show_result(result, tracker)
    if result.loss_after >= result.loss_before:
        raise SystemExit("The held-out loss did not fall.")


if __name__ == "__main__":
    main()

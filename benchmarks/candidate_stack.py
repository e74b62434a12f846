"""What each candidate adds to a training step, stacked one on the other, without a search around it.

    python benchmarks/candidate_stack.py --out r --stack compile_blocks+compile_loss+float8 float8_mlp float8_siblings

Each entry of ``--stack`` (candidates joined by +) is applied on top of those before, each by its first proposal, and a
whole step of the Llama of the other benchmarks (forward, backward, fused AdamW, fp32 weights under bf16 autocast) is
timed in a plain loop; on a GPU, three more are profiled: its kernels, and the time when none ran. Nothing is judged
here, the losses are shown: gates are the search's. ``name@1`` takes the second proposal, and ``name:{json}`` applies
that setting without asking the candidate.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from llama import SHAPES, CausalLM, random_loader
from results_table import environment, markdown, versions, write_dated
from step_gaps import kernel_intervals, read_gaps

from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Change
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.hardware import detect
from kpt_lightning.optimize.apply import applied
from kpt_lightning.optimize.rules import on_device
from kpt_lightning.validation.calls import record_calls
from kpt_lightning.validation.state import preserved

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROFILED = 3


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    seed_everything(0)
    torch.set_float32_matmul_precision("high")
    module = CausalLM(options.shape, 3e-4).to(DEVICE)
    loader = random_loader(SHAPES[options.shape]["vocab_size"], options.batch, options.length, options.steps)
    batches = [batch.to(DEVICE) for batch in loader]
    subject = subject_of(module, batches[0], options)
    kept: list[Change] = []
    runs = []
    for entry in ["plain", *options.stack]:
        begin = time.perf_counter()
        run: dict[str, Any] = {"date": date.today().isoformat(), "entry": entry}
        try:
            if entry != "plain":
                kept += proposals(subject, kept, entry.split("+"), batches[0])
            run |= measure(subject, kept, batches)
        except Exception as error:  # noqa: BLE001  one entry of a benchmark may fail, and the next is measured without it
            run["error"] = f"{type(error).__name__}: {error}"
            names = [re.split("[:@]", name)[0] for name in entry.split("+")]
            kept = [change for change in kept if change.candidate not in names]
        run["seconds"] = time.perf_counter() - begin
        runs.append(run)
        print({key: value for key, value in run.items() if key not in ("step_ms", "losses", "profile")}, flush=True)
    where = environment()
    for run in runs:
        run["environment"] = where
    text = table(runs, f"{options.batch} x {options.length} tokens, shape {options.shape}; {versions(where)}")
    path = write_dated(options.out, "candidate_stack", where["device"], runs, text)
    print(path, text, json.dumps([change.candidate for change in kept]), sep="\n\n")


def subject_of(module: CausalLM, batch: torch.Tensor, options: argparse.Namespace) -> Subject:
    """The model as a plain loop under autocast gives it."""
    section = {"emulate": True, "only_where_it_pays": False} if DEVICE.type == "cpu" else {}
    config = KptConfig.build({"level": "aggressive", "precision": "fp8", "float8": section})
    optimizer = torch.optim.AdamW(
        module.parameters(), 3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=DEVICE.type == "cuda"
    )
    profile = on_device(detect(), DEVICE.type)
    return Subject(
        model=module.model, profile=profile, config=config, device=DEVICE, compute_dtype=torch.bfloat16, batch=batch,
        optimizer=optimizer,
    )  # fmt: skip


def proposals(subject: Subject, kept: Sequence[Change], names: Sequence[str], batch: torch.Tensor) -> list[Change]:
    """The first change of each candidate, looked for on top of what was kept and of each other."""
    found: list[Change] = []
    for name in names:
        eager = [change for change in (*kept, *found) if not change.candidate.startswith("compile")]
        with applied(subject, eager), preserved(subject.model):
            subject.calls = record_calls(subject.model, lambda: loss_of(subject, batch))
        name, _, setting = name.partition(":")
        if setting:
            found.append(Change(candidate=name, setting=json.loads(setting), reason="as given"))
            continue
        name, _, number = name.partition("@")
        with applied(subject, [*kept, *found]), preserved(subject.model):
            offered = registry.candidate(name).applies(subject)
        changes = [each for each in offered if isinstance(each, Change)]
        if len(changes) <= int(number or 0):
            raise ValueError(f"{name}: {'; '.join(each.reason for each in offered)}")
        print(name, changes[int(number or 0)].reason, flush=True)
        found.append(changes[int(number or 0)])
    return found


def loss_of(subject: Subject, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16), subject.forward_context():
        loss: torch.Tensor = subject.model(input_ids=batch, labels=batch).loss
    return loss


def measure(subject: Subject, kept: Sequence[Change], batches: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Milliseconds of each step, first losses and peak memory; weights and optimizer go on from entry to entry."""
    optimizer, losses, times = subject.optimizer, [], []
    assert optimizer is not None
    with applied(subject, kept):
        for number, batch in enumerate(batches):
            if number == 3 and DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times.append(_clock())
            losses.append(step(subject, optimizer, batch))
        times.append(_clock())
        profile = profiled(subject, optimizer, batches[:PROFILED]) if DEVICE.type == "cuda" else None
    milliseconds = [_between(first, second) for first, second in pairwise(times)]
    steady = milliseconds[len(milliseconds) // 3 :]
    return {
        "step_ms": milliseconds, "median_ms": statistics.median(steady), "least_ms": min(steady),
        "most_ms": max(steady), "n": len(steady), "losses": [float(loss) for loss in losses],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None, "profile": profile,
    }  # fmt: skip


def step(subject: Subject, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> torch.Tensor:
    loss = loss_of(subject, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def profiled(subject: Subject, optimizer: torch.optim.Optimizer, batches: Sequence[torch.Tensor]) -> dict[str, Any]:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for batch in batches:
            step(subject, optimizer, batch)
        torch.cuda.synchronize()
    return read_gaps(kernel_intervals(profiler), len(batches))


def _clock() -> Any:
    if DEVICE.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, second: Any) -> float:
    if DEVICE.type != "cuda":
        return 1e3 * float(second - first)
    second.synchronize()
    return float(first.elapsed_time(second))


def table(runs: Sequence[dict[str, Any]], what: str) -> str:
    """One line an entry."""
    plain, before, rows = runs[0].get("median_ms"), None, []
    for run in runs:
        if (median := run.get("median_ms")) is None:
            rows.append([run["entry"], run["error"].splitlines()[0][:160], "", "", "", "", "", ""])
            continue
        peak = "not measured" if run["peak_gb"] is None else f"{run['peak_gb']:.1f}"
        spread = f"{run['least_ms']:.1f} to {run['most_ms']:.1f} (n = {run['n']})"
        gain = "" if before is None else f"{before / median:.3f}x"
        against = "" if plain is None else f"{plain / median:.3f}x"
        losses = ", ".join(f"{run['losses'][at]:.3f}" for at in (0, -1))
        idle = "not measured" if run["profile"] is None else f"{run['profile']['idle_ms']:.1f}"
        rows.append([run["entry"], f"{median:.1f}", spread, idle, gain, against, peak, losses])
        before = median
    columns = (
        "on top of the rows above",
        "ms a step",
        "spread",
        "of it without a kernel, profiled",
        "gain",
        "against plain",
        "peak GB",
        "first, last loss",
    )
    head = f"# Candidates stacked one on the other\n\nMade by `python benchmarks/candidate_stack.py`; {what}.\n"
    return f"{head}\n{markdown(columns, rows)}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", nargs="+", required=True)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()

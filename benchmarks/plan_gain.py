"""Plan one model of ``cpu_models`` by trial in this process, then measure again and again what the plan gains.

Each repeat measures plain against plan, and plain against plain (A/A) by the same method right after. Where the plan
changes the optimizer a step includes it, as in the plan's own figure; else it is one forward and backward pass. Driven
by bench_auto_optimize.py.

    python benchmarks/plan_gain.py --model mlp --level balanced --out mlp.json
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cpu_models import MODELS, Case, build
from results_table import environment

from kpt_lightning import auto_optimize, plan_of, restore
from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Stage
from kpt_lightning.errors import KptError
from kpt_lightning.measure.interleave import ROUNDS, SLOW_ROUNDS, SLOW_SECONDS, Gain, measure_gain
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.validation.loss_run import preserved_weights
from kpt_lightning.validation.workload import Workload


def main() -> None:
    options = parse()
    started = time.monotonic()
    try:
        case = build(options.model)
    except KptError as error:
        raise SystemExit(str(error)) from error
    report = measure(case, options.level, options.repeats, options.max_seconds)
    report |= {
        "model": options.model, "max_seconds": options.max_seconds, "process_seconds": time.monotonic() - started,
        "environment": environment(),
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=1))
    gains = [each["plan"]["ratio"] for each in report["repeats"]]
    print(f"{report['summary']}; measured again: {min(gains):.3f} to {max(gains):.3f}")


def measure(case: Case, level: str, repeats: int, max_seconds: float) -> dict[str, Any]:
    """Everything that is measured on one model at one level, as JSON-like data."""
    load = os.getloadavg()[0]
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-4)
    arguments = (case.model, case.batch, case.loss_fn, optimizer)
    auto_optimize(*arguments, level=level, max_seconds=max_seconds, cache=False)
    found = plan_of(case.model)
    restore(case.model)
    assert found is not None
    # As another run reads it from its file.
    plan = Plan.from_dict(json.loads(json.dumps(found.to_dict())))

    with_optimizer = any(registry.candidate(change.candidate).stage is Stage.OPTIMIZER for change in plan.changes)
    step = make_step(case, optimizer if with_optimizer else None)

    @contextmanager
    def planned() -> Iterator[None]:
        auto_optimize(*arguments, plan=plan)
        try:
            # The first step is looked at and the second held against the plan, once in a training run.
            for _ in range(2):
                step()
            yield
        finally:
            restore(case.model)

    with preserved_step(case, optimizer):
        seconds = plain_seconds(step)
        rounds = SLOW_ROUNDS if seconds > SLOW_SECONDS else ROUNDS
        measured = []
        for _ in range(repeats):
            pair = {"plan": gain(planned, step, rounds), "plain": gain(nullcontext, step, rounds)}
            measured.append({name: asdict(each) for name, each in pair.items()} | {"load": os.getloadavg()[0]})
    return {
        "title": case.title, "level": level, "parameters": sum(each.numel() for each in case.model.parameters()),
        "step": "with optimizer" if with_optimizer else "forward and backward", "plain_ms": seconds * 1e3,
        "rounds": rounds, "predicted": prediction(plan), "repeats": measured, "load_before": load,
        "trial_seconds": plan.seconds, "summary": plan.summary(), "plan": plan.to_dict(),
    }  # fmt: skip


def prediction(plan: Plan) -> dict[str, float] | None:
    """What the plan says that it gains; None where it changes nothing."""
    whole = plan.whole
    if whole is None or not whole.kept or whole.gain is None or whole.expect_low is None or whole.expect_high is None:
        return None
    return {"gain": whole.gain, "low": whole.expect_low, "high": whole.expect_high}


def make_step(case: Case, optimizer: torch.optim.Optimizer | None) -> Callable[[], None]:
    """One unit of training work on the model in the state that it is in."""
    work = Workload(case.model, case.batch, case.loss_fn)

    def step() -> None:
        work.loss().backward()
        if optimizer is not None:
            optimizer.step()
        case.model.zero_grad(set_to_none=True)

    return step


@contextmanager
def preserved_step(case: Case, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put back what optimizer steps change."""
    with preserved_weights(case.model.parameters()):
        try:
            yield
        finally:
            optimizer.state.clear()


def plain_seconds(step: Callable[[], None]) -> float:
    """The median of five, after one that warms up."""
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def gain(state: Callable[[], AbstractContextManager[None]], step: Callable[[], None], rounds: int) -> Gain:
    """``state`` against the plain model."""
    return measure_gain(nullcontext, state, step, device=torch.device("cpu"), rounds=rounds, give_up=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--level", choices=("conservative", "balanced"), required=True)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--max-seconds", type=float, default=120.0, help="budget of the trial")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""A history to look at: real records with seeded noise and changes planted at known places."""

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from kpt_lightning.tracking.record import Metric, RunKey, RunRecord

START = datetime(2026, 1, 5, 9, 30, tzinfo=UTC)
STEADY_KEY = RunKey(
    name="pretrain-1b", model="3f1a", config="77c0", device="NVIDIA H100 80GB HBM3", device_count=8,
    strategy="KptFSDP2", precision="fp8",
)  # fmt: skip
SLOWER_KEY = replace(STEADY_KEY, name="finetune-8b-lora", precision="bf16-mixed", device_count=2, strategy="KptDDP")
FASTER_KEY = replace(STEADY_KEY, name="encoder", model="9b2e", precision="bf16-mixed", device_count=1)

PLANTED_AT, PLANTED = 42, 1.10
"""The run of ``SLOWER_KEY`` from which on a step takes 10 % longer."""

MOVED_AT = 24
"""The run of ``SLOWER_KEY`` before which torch was another version."""

QUANTILES_SINCE = 38
"""The first run whose record holds the quantiles of its steps; those before are of an older version."""


def plan_of(attention: str, layers: int = 6) -> dict[str, Any]:
    """In the form of ``Plan.to_dict``."""

    def decided(name: str) -> dict[str, Any]:
        return {"subject": name, "accepted": True, "reason": "large enough"}

    change = {"candidate": "causal_attention", "setting": {"backend": attention}, "reason": "masks", "predicted": 1.1}
    return {
        "config": {"level": "balanced"}, "device": SLOWER_KEY.device, "precision": "bf16-mixed", "parallel": "ddp",
        "choices": [decided("fp8"), decided("compile")], "layers": [decided(f"layers.{n}.mlp") for n in range(layers)],
        "blocks": [], "proofs": [], "changes": [change], "trials": [], "basis": "trial", "seconds": 31.0, "whole": None,
    }  # fmt: skip


def skewed(middle: float, mad: float, tails: random.Random) -> tuple[float, ...]:
    """Quantiles of steps some of which take much longer."""
    share = tails.uniform(0.75, 0.95)
    distances = (-2.1 * share, -share, 0.0, 2.0 - share, tails.uniform(3.0, 5.0))
    return tuple(middle + mad * distance for distance in distances)


def run(key: RunKey, number: int, usual: float, factor: float, chance: random.Random, **changes: Any) -> RunRecord:
    """One finished run whose step takes ``factor`` times the ``usual`` seconds; every metric has its own noise."""
    step_time, tails = usual * factor, random.Random(number)

    def noisy(value: float, unit: str, better: str, steps: int = 200) -> Metric:
        mad = value * 0.004 * chance.uniform(0.7, 1.4) if steps > 1 else None
        middle = value * chance.gauss(1.0, 0.006)
        quantiles = skewed(middle, mad, tails) if mad is not None and number >= QUANTILES_SINCE else None
        return Metric(
            median=middle, unit=unit, better=better, n=steps, n_effective=steps / 2, mad=mad, quantiles=quantiles
        )

    metrics = {
        "step_time": noisy(step_time, "s", "lower"),
        "tokens_per_second": noisy(65536 / step_time, "tokens/s", "higher"),
        "mfu": noisy(0.43 / factor, "1", "higher"),
        "data_wait": noisy(0.0009, "s", "lower"),
        "peak_memory": noisy(41.5 * 2**30, "bytes", "lower", 1),
        "first_step_time": noisy(38.0, "s", "lower", 1),
        "final_loss": noisy(2.31, "1", "lower", 20),
    }
    record = RunRecord(
        run_id=f"{chance.getrandbits(128):032x}", created_at=(START + timedelta(hours=13 * number)).isoformat(),
        key=key, status="finished", metrics=metrics,
        environment={
            "torch": "2.10.0", "cuda": "13.0", "driver": "580.65", "host": "5e1f00aa9b21", "python": "3.11.7",
            "git_commit": f"{chance.getrandbits(160):040x}",
        },
        loss_finite=True, details={"steps": 500, "device_type": "cuda", "config": {"batch": [8, 4096], "lr": 3e-4}},
        plan=plan_of("flash"),
    )  # fmt: skip
    return replace(record, **changes)


def demo_history(seed: int = 7) -> list[RunRecord]:
    """Three keys: one slower since a change of the plan, one steady, one faster; with failed and interrupted runs."""
    chance = random.Random(seed)
    made = []
    for number in range(60):
        moved, planted = number >= MOVED_AT, number >= PLANTED_AT
        factor = (0.97 if moved else 1.0) * (PLANTED if planted else 1.0)
        slower = run(SLOWER_KEY, number, 0.1012, factor, chance, plan=plan_of("math" if planted else "flash"))
        if not moved:
            slower = replace(slower, environment={**slower.environment, "torch": "2.9.1", "cuda": "12.9"})
        if number in (17, 50):
            slower = replace(slower, status="failed", metrics={}, notes=("CUDA out of memory",))
        made.append(replace(slower, status="interrupted") if number == 33 else slower)
        made.append(run(STEADY_KEY, number, 0.412, 1.0, chance))
        if number >= 20:
            made.append(run(FASTER_KEY, number, 0.0333, 0.85 if number >= 45 else 1.0, chance))
    return made

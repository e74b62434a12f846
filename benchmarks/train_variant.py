"""Train one variant in this process and write what was measured as JSON. Driven by bench_foundation.py.

python benchmarks/train_variant.py --variant kpt --shape 1b --batch 4 --length 4096 --steps 30 --out kpt.json
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from encoders import ENCODERS, Encoder, sample_loader
from lightning.pytorch import Callback, Trainer, seed_everything
from llama import SHAPES, CausalLM, random_loader, text_loaders

VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain-compiled-blocks": None,
    "plain-bf16-true": None,
    "torchao-bf16-true": None,
    "torchao-bf16-mixed": None,
    "kpt": {},
    "kpt-aggressive": {"level": "aggressive"},
    "kpt-true": {"precision": "fp8-true"},
    "kpt-true-aggressive": {"precision": "fp8-true", "level": "aggressive"},
    "kpt-rowwise": {"precision": "fp8", "float8": {"recipe": "rowwise"}},
    "kpt-rowwise_with_gw_hp": {"precision": "fp8", "float8": {"recipe": "rowwise_with_gw_hp"}},
    "kpt-bf16-mixed": {"precision": "bf16-mixed"},
    "kpt-trial": {},
    "plain-trial": None,
    "user-compiled": None,
    "user-compiled-trial": None,
}


class Clock(Callback):
    """Device time between the ends of steps, read after training: no synchronisation a step."""

    def __init__(self, profile_step: int | None) -> None:
        self.events: list[torch.cuda.Event] = []
        self.losses: list[torch.Tensor] = []
        self.profile_step, self.profiler = profile_step, None
        self.kernels: list[tuple[str, float]] = []
        self.attention: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        if index == self.profile_step:
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(outputs["loss"].detach())
        if self.profiler is not None:
            torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            self._read(self.profiler)
            self.profiler = None
        if torch.cuda.is_available():
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()

    def _read(self, profiler: Any) -> None:
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                self.kernels.append((event.name, event.device_time))
            if "_scaled_dot_product" in event.name and "backward" not in event.name:
                self.attention.append(f"{event.name} inputs {event.input_shapes} values {event.concrete_inputs}")

    def milliseconds(self, skip: int) -> list[float]:
        pairs = list(zip(self.events, self.events[1:], strict=False))[skip:]
        return [first.elapsed_time(second) for first, second in pairs]


def main() -> None:
    options = parse()
    seed_everything(options.seed)
    torch.set_float32_matmul_precision("high")
    module, loader, held_out = make_work(options)
    clock = Clock(options.steps - 3 if options.profile else None)
    trainer = make_trainer(options, module, clock)
    start = time.perf_counter()
    trainer.fit(module, loader)
    seconds = time.perf_counter() - start
    plan = next(
        (found for each in (*trainer.callbacks, trainer.strategy) if (found := getattr(each, "plan", None))), None
    )
    report = {
        "variant": options.variant, "shape": options.shape, "batch": options.batch, "length": options.length,
        "vocab_size": options.vocab_size, "seed": options.seed, "steps": options.steps,
        "step_ms": clock.milliseconds(options.skip), "fit_seconds": seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        "losses": [float(loss) for loss in clock.losses],
        "plan": plan.to_dict() if plan is not None else None,
        "kernels_ms": kernel_table(clock.kernels), "attention": Counter(clock.attention).most_common(4),
        "dynamo": {key: dict(value) for key, value in torch._dynamo.utils.counters.items()},
        "environment": environment(),
    }  # fmt: skip
    if clock.milliseconds(options.skip):
        report["median_ms"] = statistics.median(report["step_ms"])
        report["tokens_per_second"] = options.batch * options.length / report["median_ms"] * 1e3
    for callback in trainer.callbacks:
        if type(callback).__name__ == "RegressionCallback":
            report["record"] = json.loads(callback.record.to_json()) if hasattr(callback.record, "to_json") else None
    if held_out is not None:
        report["held_out_loss"] = trainer.validate(module, held_out, verbose=False)[0]["held_out_loss"]
    options.out.write_text(json.dumps(report, indent=1))
    shown = {key: report.get(key) for key in ("variant", "median_ms", "tokens_per_second", "peak_gb", "held_out_loss")}
    print(json.dumps(shown), "last loss", report["losses"][-1], flush=True)
    if plan is not None:
        print(plan.summary(), [proof.reason for proof in plan.proofs], flush=True)


def make_work(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Module, loader, and the loader of held-out text where there is text."""
    if options.shape in ENCODERS:
        loader: Any = sample_loader(options.shape, options.batch, options.length, options.steps)
        return Encoder(options.shape, options.learning_rate), loader, None
    vocab_size = options.vocab_size or SHAPES[options.shape]["vocab_size"]
    # fp32 weights of the largest shape and their cast do not fit beside each other.
    dtype = torch.bfloat16 if "-true" in options.variant else torch.float32
    module = CausalLM(options.shape, options.learning_rate, vocab_size, options.warmup, dtype)
    if options.text is None:
        return module, random_loader(vocab_size, options.batch, options.length, options.steps), None
    texts = text_loaders(options.text, vocab_size, options.batch, options.length, options.steps, options.held_out)
    return module, *texts


def make_trainer(options: argparse.Namespace, module: Any, clock: Clock) -> Trainer:
    common: dict[str, Any] = dict(
        max_epochs=1, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trial: list[Callback] = []
    if options.variant.endswith("-trial"):
        from kpt_lightning import AutoOptimizeCallback

        trial = [AutoOptimizeCallback(cache=False, max_seconds=options.max_seconds)]
    if options.variant.startswith("user-compiled"):
        module.model.compile()
    if options.variant.startswith(("plain", "user-compiled")):
        if options.variant == "plain-compiled-blocks":
            for block in module.blocks():
                block.compile()
        precision = "bf16-true" if options.variant == "plain-bf16-true" else "bf16-mixed"
        return Trainer(precision=precision, callbacks=[*trial, clock], **common)
    if options.variant.startswith("torchao"):
        torchao_tensorwise(module)
        return Trainer(precision=options.variant.removeprefix("torchao-"), callbacks=[clock], **common)
    from kpt_lightning import KptStrategy, RegressionCallback

    callbacks = (
        [*trial, clock]
        if options.no_callback
        else [*trial, clock, RegressionCallback(store=str(options.out) + ".sqlite")]
    )
    return Trainer(strategy=KptStrategy(VARIANTS[options.variant]), callbacks=callbacks, **common)


def torchao_tensorwise(module: Any) -> None:
    """The best peer known: FP8 linears of torchao, each block compiled."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("tensorwise")
    heads = ("lm_head", "classifier", "cls")
    convert_to_float8_training(
        module.model, config=config, module_filter_fn=lambda _, name: not any(head in name for head in heads)
    )
    for block in module.blocks():
        block.compile()


def kernel_table(kernels: list[tuple[str, float]]) -> list[tuple[str, int, float]]:
    """(name, launches, milliseconds), the costliest first."""
    counts, times = Counter(), Counter()
    for name, microseconds in kernels:
        counts[name[:110]] += 1
        times[name[:110]] += microseconds / 1e3
    return [(name, counts[name], round(value, 3)) for name, value in times.most_common(70)]


def environment() -> dict[str, Any]:
    from importlib.metadata import version

    found = {name: version(name) for name in ("torch", "lightning", "transformers")}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    found |= {"commit": commit.stdout.strip() or "unknown"}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found |= {"triton": version("triton")}
        found |= {"device": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--shape", choices=[*SHAPES, *ENCODERS], default="1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--skip", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--warmup", type=int, default=0, help="steps of linear learning rate warm-up")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--text", type=Path, help="where token ids of real text are kept; random tokens without it")
    parser.add_argument("--held-out", type=int, default=20)
    parser.add_argument("--max-seconds", type=float, default=120.0, help="budget of a trial")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-callback", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""An ordinary Accelerate loop and an ordinary HF Trainer run, which know nothing of kpt_lightning. Driven by
bench_huggingface.py, with ``-m kpt_lightning.launch`` before it or not.

python benchmarks/huggingface_train.py --loop raw --shape 1b --batch 4 --length 4096 --steps 30 --out raw.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AORecipeKwargs, TorchDynamoPlugin
from llama import SHAPES, CausalLM, random_loader
from results_table import environment
from transformers import Trainer, TrainerCallback, TrainingArguments


class Clock:
    """Ends of optimizer steps on the device, read after training; on a CPU those of the host."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> None:
        if torch.cuda.is_available():
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if not torch.cuda.is_available():
            return [1e3 * (after - before) for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]


def raw(options: argparse.Namespace, clock: Clock) -> list[float]:
    """Losses of a loop as Accelerate's examples write it."""
    handlers = [AORecipeKwargs()] if options.mixed_precision == "fp8" else []
    # Blocks, not the whole: what Accelerate recommends for repeated layers.
    compiled = TorchDynamoPlugin(backend="inductor", use_regional_compilation=True) if options.compile else None
    accelerator = Accelerator(mixed_precision=options.mixed_precision, kwargs_handlers=handlers, dynamo_plugin=compiled)
    module = CausalLM(options.shape, 3e-4)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    model, optimizer, loader = accelerator.prepare(
        module.model,
        module.configure_optimizers(),
        random_loader(vocabulary, options.batch, options.length, options.steps),
    )
    model.train()
    losses = []
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        clock.mark()
    return torch.stack(losses).tolist()


def trainer(options: argparse.Namespace, clock: Clock) -> list[float]:
    """Losses of the Hugging Face Trainer."""

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.mark()

    vocabulary = SHAPES[options.shape]["vocab_size"]
    rows = random_loader(vocabulary, options.batch, options.length, options.steps).dataset
    arguments = TrainingArguments(
        str(options.out.with_suffix("")),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=3e-4,
        max_grad_norm=0.0,
        optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        bf16=options.mixed_precision == "bf16",
        torch_compile=options.compile,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_steps=options.steps,
        disable_tqdm=True,
    )

    def joined(examples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = torch.stack(examples)
        return {"input_ids": ids, "labels": ids}

    run = Trainer(
        CausalLM(options.shape, 3e-4).model, arguments, data_collator=joined, train_dataset=rows, callbacks=[Marks()]
    )
    run.train()
    return [entry["train_loss"] for entry in run.state.log_history if "train_loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", choices=("raw", "trainer"), required=True)
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16", "fp8"))
    parser.add_argument("--compile", action="store_true", help="by Accelerate or the Trainer")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    clock = Clock()
    losses = (raw if options.loop == "raw" else trainer)(options, clock)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    answer = {**settings, "losses": losses, "step_ms": clock.milliseconds(), "peak_bytes": peak}
    options.out.write_text(json.dumps({**answer, "environment": environment()}))


if __name__ == "__main__":
    main()

"""Run a fine-tuning recipe from start to end: load, measure, train, measure again."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kpt_lightning.recipes import smollm2, text
from kpt_lightning.recipes.causal_lm import CausalLM, FineTuneConfig, add_lora

Say = Callable[[object], None]


@dataclass(frozen=True, slots=True)
class FineTuneResult:
    """What a run did.

    Attributes:
        loss_before: Held-out loss of the model as it came, in nats per token.
        loss_after: The same after training.
        tokens: Tokens trained on.
        trainer: The trainer, whose strategy has the plan.
        module: The fine-tuned module.
    """

    loss_before: float
    loss_after: float
    tokens: int
    trainer: Trainer
    module: CausalLM


class Rows(Dataset[Tensor]):
    """The rows of a tensor, one sequence each."""

    def __init__(self, tokens: Tensor) -> None:
        """Keep the tensor: int64, shape ``(sequences, length)``."""
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]


def fine_tune_smollm2(
    config: FineTuneConfig, *, strategy: Strategy | str, callbacks: Sequence[Callback] = (), say: Say = print
) -> FineTuneResult:
    """LoRA on SmolLM2-135M with text of the standard library, on one device.

    Args:
        config: See :func:`kpt_lightning.recipes.causal_lm.smollm2_lora`.
        strategy: For the Trainer, such as ``KptStrategy()``.
        callbacks: For the Trainer.
        say: Receives a line before each step that takes seconds, and the plan once it is made.

    Raises:
        MissingDependencyError: Where a package of the extra ``finetune`` is absent.
    """
    say("Loading the tokenizer ...")
    tokenizer = smollm2.load_tokenizer()
    say("Reading and tokenizing the standard library ...")
    corpus = text.standard_library(
        lambda source: list(tokenizer(source, add_special_tokens=False, verbose=False)["input_ids"]),
        int(tokenizer.eos_token_id),
        length=config.sequence_length,
        train_sequences=config.steps * config.batch_size,
        held_out_sequences=config.held_out_sequences,
        seed=config.seed,
    )
    say("Loading SmolLM2-135M: its 4-bit weights become float32 ...")
    return fine_tune(config, smollm2.load_model(), corpus, strategy=strategy, callbacks=callbacks, say=say)


def fine_tune(
    config: FineTuneConfig,
    model: nn.Module,
    corpus: text.Corpus,
    *,
    strategy: Strategy | str,
    callbacks: Sequence[Callback] = (),
    say: Say = print,
) -> FineTuneResult:
    """LoRA on any Hugging Face causal language model, on one device, with the held-out loss before and after.

    Args:
        config: Settings; the corpus must have been cut to them.
        model: The pretrained model; it gets adapters in place.
        corpus: Packed tokens.
        strategy: For the Trainer.
        callbacks: For the Trainer.
        say: Receives progress lines, and the plan once it is made.

    Raises:
        MissingDependencyError: Where peft is absent.
    """
    held_out = DataLoader(Rows(corpus.held_out), batch_size=config.batch_size)
    train = DataLoader(Rows(corpus.train), batch_size=config.batch_size)
    # Adapters and loaders draw random numbers; the caller's generator stays as it was.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # The data is in memory: worker processes would only cost.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        torch.manual_seed(config.seed)
        module = CausalLM(add_lora(model, config), config)
        trainer = _trainer(config, strategy, callbacks)
        say("Held-out loss of the pretrained model ...")
        before = _held_out_loss(trainer, module, held_out)
        if (plan := getattr(trainer.strategy, "plan", None)) is not None:
            say(plan.render())
        say(f"Training: {config.steps} steps of {config.batch_size} x {config.sequence_length} tokens ...")
        trainer.fit(module, train)
        say("Held-out loss of the fine-tuned model ...")
        after = _held_out_loss(trainer, module, held_out)
    tokens = trainer.global_step * config.batch_size * config.sequence_length
    return FineTuneResult(before, after, tokens, trainer, module)


def _trainer(config: FineTuneConfig, strategy: Strategy | str, callbacks: Sequence[Callback]) -> Trainer:
    return Trainer(
        devices=1,
        strategy=strategy,
        max_steps=config.steps,
        max_epochs=1,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def _held_out_loss(trainer: Trainer, module: CausalLM, loader: "DataLoader[Tensor]") -> float:
    """Mean loss over the sequences of the loader, nats per token."""
    (metrics,) = trainer.test(module, loader, verbose=False)
    return float(metrics["held_out_loss"])

"""Next-token training of a causal language model: every weight, or adapters on frozen weights."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn import functional

from kpt_lightning.recipes import export, models
from kpt_lightning.recipes.adapters import add_lora, quantize_base
from kpt_lightning.recipes.config import FineTuneConfig
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.spans import NOT_LEARNED
from kpt_lightning.recipes.task import Batch, Say, Task, Totals
from kpt_lightning.recipes.token_data import read_tokens
from kpt_lightning.recipes.unused_settings import refuse_unused


def make_task(config: FineTuneConfig, say: Say = print) -> Task:
    """The model with what is trained on it, and the tokenized data.

    Args:
        config: Of one of the causal-lm recipes.
        say: Receives a line before each step that takes seconds.

    Raises:
        ConfigError: Model or data are not there or do not fit.
        MissingDependencyError: An optional package is absent.
    """
    refuse_unused(config.recipe, config.data, set(DataConfig.model_fields) - {"label"})
    say(f"Loading {config.model} in float32 ...")
    tokenizer, model = models.load_tokenizer(config.model), models.load_causal_lm(config.model)
    say(f"Reading and tokenizing {config.data.source} ...")
    data = read_tokens(
        config.data, tokenizer, train_rows=config.steps * config.gradient_accumulation * config.batch_size * _world(),
        held_out_rows=config.held_out_batches * config.batch_size,
    )  # fmt: skip
    say(data.render())
    return Task(
        # Asked of the model before adapters hide what it takes.
        collate=data.collate_for(model), train=data.train.rows, held_out=data.held_out.rows, loss=loss,
        metrics=metrics, processor=tokenizer, export=partial(_export, config, tokenizer), unit="tokens",
        count=count_tokens, model=prepared(model, config),
    )  # fmt: skip


def prepared(model: nn.Module, config: FineTuneConfig) -> nn.Module:
    """The model in train mode with what the recipe trains: every weight, or adapters that it adds in place."""
    if config.method != "full":
        model = add_lora(model, config.lora)
    if config.method == "qlora":
        quantize_base(model, config.base)
    return model.train()  # from_pretrained leaves it in eval mode


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token, in nats, a scalar."""
    value = model(**batch).loss
    assert isinstance(value, Tensor)
    return value


def metrics(model: nn.Module, batch: Batch) -> Totals:
    """Sums over the tokens that are learned: cross-entropy in nats, and how many are the likeliest."""
    labels = batch["labels"][:, 1:]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1].float()
    learned = labels != NOT_LEARNED
    weight = float(learned.sum())
    total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NOT_LEARNED, reduction="sum")
    right = ((logits.argmax(-1) == labels) & learned).sum()
    return {"loss": (float(total), weight), "accuracy": (float(right), weight)}


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding included."""
    return batch["input_ids"].numel()


def _world() -> int:
    """Processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _export(config: FineTuneConfig, tokenizer: Any, model: nn.Module, folder: Path) -> None:
    if config.merge:
        export.save_merged(model, partial(models.load_causal_lm, config.model), tokenizer, folder)
    else:
        export.save(model, tokenizer, folder)

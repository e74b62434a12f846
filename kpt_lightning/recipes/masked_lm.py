"""Masked language modeling: continued pretraining of an encoder on words that were masked out."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes import export, minilm
from kpt_lightning.recipes.config import FineTuneConfig
from kpt_lightning.recipes.held_out import read_parts
from kpt_lightning.recipes.joined_rows import joined_rows
from kpt_lightning.recipes.masking import IGNORED, Masking
from kpt_lightning.recipes.task import Batch, Say, Task, Totals
from kpt_lightning.recipes.unused_settings import refuse_unused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

USED = (
    "source", "held_out", "group", "text", "sample_by", "sequence_length", "pieces_per_document", "train_documents",
    "held_out_documents",
)  # fmt: skip


def make_task(config: FineTuneConfig, say: Say = print) -> Task:
    """The model with its masked-token head, and rows of joined text.

    Args:
        config: Of the recipe masked-lm.
        say: Receives a line before each step that takes seconds, and which weights the checkpoint lacked.

    Raises:
        ConfigError: Model or data are not there or do not fit.
        MissingDependencyError: An optional package is absent.
    """
    refuse_unused(config.recipe, config.data, USED)
    tokenizer = minilm.load_tokenizer(config.model)
    if tokenizer.mask_token_id is None:
        rule = "its tokenizer has no mask token"
        raise ConfigError("model", config.model, rule, "Take an encoder, such as minilm, or a causal-lm recipe")
    say(f"Reading and tokenizing {config.data.source} ...")
    parts = read_parts(config.data)
    train, held_out = (joined_rows(rows, config.data, tokenizer) for rows in (parts.train, parts.held_out))
    say(f"Loading {config.model} ...")
    model = _model(config, tokenizer, say)
    masking = Masking(tokenizer, config.seed)
    return Task(
        model=model, train=cast("Dataset[Any]", [{"input_ids": row} for row in train]),
        # Masked once and row by row: the same words before and after training, whatever the batch size.
        held_out=cast("Dataset[Any]", [{k: v[0] for k, v in masking.mask([row]).items()} for row in held_out]),
        collate=masking, loss=loss, metrics=metrics, processor=tokenizer, export=partial(_export, tokenizer),
        unit="tokens", count=count_tokens,
    )  # fmt: skip


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the masked words, in nats, a scalar."""
    value = model(**batch).loss
    assert isinstance(value, Tensor)
    return value


def metrics(model: nn.Module, batch: Batch) -> Totals:
    """Sums over the masked words: cross-entropy in nats, and how many are the likeliest."""
    chosen = batch["labels"] != IGNORED
    logits, labels = model(input_ids=batch["input_ids"]).logits[chosen].float(), batch["labels"][chosen]
    total = functional.cross_entropy(logits, labels, reduction="sum")
    weight = float(len(labels))
    return {"loss": (float(total), weight), "accuracy": (float((logits.argmax(-1) == labels).sum()), weight)}


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch, masked or not."""
    return batch["input_ids"].numel()


def _model(config: FineTuneConfig, tokenizer: "PreTrainedTokenizerBase", say: Say) -> "PreTrainedModel":
    model, new = minilm.load_model("AutoModelForMaskedLM", config.model)
    length = config.data.sequence_length
    minilm.check_length(length, length, tokenizer, model)
    if new:
        say(
            f"Not in the checkpoint of {config.model}, new and random: {', '.join(new)}. The figures before training "
            "say little about the encoder, and a good part of the gain is the new head's"
        )
    return model


def _export(tokenizer: "PreTrainedTokenizerBase", model: nn.Module, folder: Path) -> None:
    export.save(model, tokenizer, folder)

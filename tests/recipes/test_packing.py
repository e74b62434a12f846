from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kpt_lightning.attention.packed import packed_lengths
from kpt_lightning.recipes.packing import ROWS_AT_ONCE, TokenRows, pack, unpacked
from kpt_lightning.recipes.spans import NOT_LEARNED, Document

PADDING = 0


def numbered(lengths: list[int]) -> list[Document]:
    """Documents whose every token tells the document."""
    return [Document([number] * length, [number] * length) for number, length in enumerate(lengths, 1)]


def unpack(rows: TokenRows) -> list[tuple[int, int]]:
    """Number and length of each document in the rows, the padding left out."""
    found = []
    for row in rows.rows:
        borders = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), len(row["position_ids"])]
        for start, end in pairwise(borders):
            ids = row["input_ids"][start:end].unique().tolist()
            assert len(ids) == 1
            assert row["position_ids"][start:end].tolist() == list(range(end - start))
            expected = [NOT_LEARNED] + [ids[0] if ids[0] != PADDING else NOT_LEARNED] * (end - start - 1)
            assert row["labels"][start:end].tolist() == expected
            if ids[0] != PADDING:
                found.append((ids[0], end - start))
    return found


@given(st.lists(st.integers(1, 16), max_size=300))
def test_every_document_is_whole_in_one_row_and_knows_its_positions(lengths: list[int]) -> None:
    rows = pack(numbered(lengths), 16, PADDING)
    assert sorted(unpack(rows)) == list(enumerate(lengths, 1))
    assert all(len(tensor) == 16 and tensor.dtype == torch.int64 for row in rows.rows for tensor in row.values())
    assert rows.tokens == 16 * len(rows) == sum(lengths) + (rows.padding or 0)
    assert rows.learned == sum(lengths) - len(lengths)
    # First-fit by falling length, in lots of ROWS_AT_ONCE rows: no two rows of a lot would fit into one.
    fullness = [int((row["input_ids"] != PADDING).sum()) for row in rows.rows]
    if sum(lengths) < ROWS_AT_ONCE * 16:
        assert all(one + other > 16 for index, one in enumerate(fullness) for other in fullness[:index])


def test_rows_of_short_texts_are_nearly_full() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 120, (4000,), generator=generator).tolist()
    rows = pack(numbered(lengths), 256, PADDING)
    assert (rows.padding or 0) / rows.tokens < 0.01
    # One document a row would waste three quarters.
    assert 1 - sum(lengths) / (256 * len(lengths)) > 0.7


def test_the_same_documents_give_the_same_rows() -> None:
    lengths = torch.randint(1, 30, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    one, two = (pack(numbered(lengths), 32, PADDING).rows for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a)


def test_no_more_documents_are_asked_for_than_the_wanted_rows_need() -> None:
    asked = 0

    def endless() -> Iterator[Document]:
        nonlocal asked
        while True:
            asked += 1
            yield Document([asked] * 8, [asked] * 8)

    assert len(pack(endless(), 16, PADDING, rows=3)) == 3
    assert asked <= 2 * ROWS_AT_ONCE
    assert len(unpacked(endless(), rows=3)) == 3


def test_first_rows_are_not_the_long_documents() -> None:
    lengths = [3, 16, 5, 16, 4, 16] * 4
    rows = pack(numbered(lengths), 16, PADDING, rows=2)
    assert {number for number, _ in unpack(rows)} >= {1, 2}


def test_packed_rows_are_known_as_such_to_the_attention_of_this_library() -> None:
    (row,) = pack(numbered([3, 4]), 9, PADDING).rows
    assert packed_lengths({"position_ids": row["position_ids"][None]}) == [[4, 3, 2]]


@pytest.mark.parametrize("count", [None, 1])
def test_without_packing_each_document_is_a_row_as_long_as_it_is(count: int | None) -> None:
    rows = unpacked(numbered([3, 7]), count)
    assert [len(row["input_ids"]) for row in rows.rows] == [3, 7][:count]
    assert rows.padding is None
    assert set(rows[0]) == {"input_ids", "labels"}

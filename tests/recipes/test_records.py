import json
from pathlib import Path

import pytest

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes import records
from kpt_lightning.recipes.data_config import DataConfig

ROWS = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]


def test_each_kind_of_source_is_read_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "rows.txt").write_text("a\nb\n")
    assert records.read_rows(str(tmp_path / "rows.jsonl")) == ROWS
    assert records.read_rows(str(tmp_path / "rows.txt"), "line") == [{"text": "a"}, {"text": "b"}]


def test_standard_library_gives_a_row_for_each_file() -> None:
    rows = records.read_rows("standard-library")
    assert {row["name"] for row in rows} >= {"json/decoder.py", "dataclasses.py"}
    assert all(row["text"].strip() for row in rows if row["name"] == "json/decoder.py")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("rows.csv", r"rows\.csv': is of no known kind\. Known: standard-library, .*\.txt, \.jsonl, \.json, \.parquet"),
        ("standard_library", r"is no built-in source, folder, or file of a known kind\. Known: standard-library"),
        ("empty.jsonl", r"empty\.jsonl': holds no row"),
        ("blank.txt", r"blank\.txt': holds no row"),
        ("absent.jsonl", r"absent\.jsonl': cannot be read"),
        ("digits", r"holds images, no rows of text"),
    ],
)
def test_what_is_no_source_of_rows_is_refused(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "empty.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "blank.txt").write_text("\n \n\n")
    with pytest.raises(ConfigError, match=message):
        records.read_rows(source)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (ROWS, {"text": "body"}, r"'body': is no column in row 1 of the source\. .*known here: text, label"),
        ([*ROWS, {"label": 3}], {}, r"'text': is no column in row 3 of the source\. .*known here: label"),
        ([*ROWS, {"text": None}], {}, r"'text': is empty in row 3"),
        (ROWS, {"text": "label"}, r"row 1 of the source holds int in column 'label', not text"),
        ([{"q": "a", "a": 3}], {"prompt": "q", "completion": "a"}, r"holds int in column 'a', not text"),
        (ROWS, {"messages": "turns"}, r"'turns': is no column in row 1"),
    ],
)
def test_a_missing_or_wrong_column_names_row_and_known_ones(
    rows: list[dict[str, object]], columns: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        records.check_text(rows, DataConfig(source="rows.jsonl", **columns), "the source")

import json
from pathlib import Path

import pytest

from kpt_lightning import optional
from kpt_lightning.errors import ConfigError, MissingDependencyError
from kpt_lightning.recipes import record_files

ROWS = [{"text": "Grüße 🙂", "label": 1}, {"text": "two\nlines", "label": 0}]


@pytest.fixture
def data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "object":
    """A small data set; what the library caches goes into the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield datasets.Dataset.from_list(ROWS)
    datasets.enable_progress_bars()


def test_lines_of_json_and_a_list_of_json_give_the_same_rows(tmp_path: Path) -> None:
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    # An editor on Windows, and a blank line at the end.
    lines.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*map(json.dumps, ROWS), "", ""]).encode())
    array.write_text(json.dumps(ROWS, indent=1))
    assert record_files.read_json(lines) == record_files.read_json(array) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": }\n', r"rows\.json:3'.*is no JSON: Expecting value, column 10"),
        (b'{"text": "a"}\n[1]\n', r"rows\.json:2'.*is no JSON object but list.*column"),
        (b'[{"text": "a"},\n {"text" "b"}]', r"rows\.json:2'.*is no JSON: Expecting ':'"),
        (b'[{"text": "a"}, 7]', r"rows\.json, element 2'.*no JSON object but int"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"rows\.json:2'.*is no UTF-8 \(byte 0xe9\)\. Save the file as UTF-8"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        record_files.read_json(file)


@pytest.mark.parametrize(
    ("sample_by", "texts"),
    [
        ("paragraph", ["one\ntwo", "three"]),
        ("line", ["one", "two", "three"]),
        ("document", ["one\ntwo\n \n\nthree"]),
    ],
)
def test_text_is_parted_as_asked(tmp_path: Path, sample_by: str, texts: list[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\ntwo\n \n\nthree\n")
    assert [row["text"] for row in record_files.read_text(file, sample_by)] == texts


def test_parquet_and_a_saved_folder_give_their_rows(data_set: object, tmp_path: Path) -> None:
    data_set.to_parquet(tmp_path / "rows.parquet")
    data_set.save_to_disk(tmp_path / "folder")
    assert record_files.read_parquet(tmp_path / "rows.parquet") == ROWS
    assert record_files.read_folder(tmp_path / "folder") == ROWS


def test_a_folder_of_splits_names_the_folders_of_its_splits(data_set: object, tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": data_set, "test": data_set}).save_to_disk(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"holds several splits.*both/train, .*both/test"):
        record_files.read_folder(tmp_path / "both")
    assert record_files.read_folder(tmp_path / "both" / "test") == ROWS


def test_other_folders_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder that datasets\.save_to_disk wrote"):
        record_files.read_folder(tmp_path)
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match=r"is no Parquet"):
        record_files.read_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        record_files.read_text(tmp_path / "absent.txt")


def test_a_data_set_by_name_gives_the_split_that_was_asked_for(data_set: object, tmp_path: Path) -> None:
    # load_dataset takes a folder of Parquet files as it takes a name on the hub.
    (tmp_path / "named").mkdir()
    data_set.to_parquet(tmp_path / "named" / "train.parquet")
    data_set.select([0]).to_parquet(tmp_path / "named" / "test.parquet")
    name = f"hub:{tmp_path / 'named'}"
    assert record_files.read_hub(name) == ROWS
    assert record_files.read_hub(f"{name}:test") == ROWS[:1]
    with pytest.raises(ConfigError, match=r"cannot be loaded: Unknown split"):
        record_files.read_hub(f"{name}:dev")


def test_a_name_that_the_hub_does_not_answer_for_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"hub:nobody/nothing'.*cannot be loaded.*or name a local file"):
        record_files.read_hub("hub:nobody/nothing")


@pytest.mark.parametrize("read", [record_files.read_parquet, record_files.read_folder])
def test_an_absent_library_is_named_with_the_pip_line(
    read: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    absent = optional.OptionalPackage("no_such_module_here", "datasets", "finetune", "reading Parquet")
    monkeypatch.setattr(record_files, "DATASETS", absent)
    with pytest.raises(MissingDependencyError, match=r"needs datasets.*kpt-lightning\[finetune\]"):
        read(tmp_path / "rows")

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes import text


def encode(source: str) -> list[int]:
    return list(source.encode())


def write_files(root: Path, sizes: dict[str, int]) -> Path:
    """Files whose every byte tells the file, so that a token shows where it came from."""
    for position, (name, size) in enumerate(sizes.items()):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(chr(ord("A") + position) * size)
    return root


def test_no_file_gives_to_both_parts(tmp_path: Path) -> None:
    names = [f"m{index}.py" for index in range(26)]
    root = write_files(tmp_path, dict.fromkeys(names, 64))
    held_out = [name for name in names if text.is_held_out(name, 0.3)]
    corpus = text.standard_library(
        encode, 0, length=8, train_sequences=30, held_out_sequences=20, held_out_share=0.3, root=root
    )
    letters = {chr(ord("A") + names.index(name)) for name in held_out}
    assert 2 <= len(held_out) <= 14
    assert {chr(token) for token in corpus.held_out.unique().tolist()} <= letters
    assert not {chr(token) for token in corpus.train.unique().tolist()} & letters


def test_standard_library_has_text_for_both_parts_and_the_same_tensors_again() -> None:
    sizes = {"length": 128, "train_sequences": 200, "held_out_sequences": 40}
    first = text.standard_library(encode, 0, **sizes)
    again = text.standard_library(encode, 0, **sizes)
    assert first.train.shape == (200, 128)
    assert first.held_out.shape == (40, 128)
    assert first.train.dtype == torch.int64
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.held_out, again.held_out)
    rows = {tuple(row) for row in first.train.tolist()}
    assert not rows & {tuple(row) for row in first.held_out.tolist()}


def test_seed_changes_the_order_and_nothing_else(tmp_path: Path) -> None:
    root = write_files(tmp_path, {f"m{index}.py": 40 for index in range(20)})
    sizes = {"length": 8, "train_sequences": 24, "held_out_sequences": 4, "held_out_share": 0.3, "root": root}
    one, two = (text.standard_library(encode, 0, seed=seed, **sizes).train for seed in (0, 1))
    assert not torch.equal(one, two)
    assert sorted(one.tolist()) == sorted(two.tolist())


def test_order_and_split_do_not_depend_on_the_salt_of_the_hash() -> None:
    code = (
        "from kpt_lightning.recipes import text; "
        "print([(n, text.is_held_out(n, 0.1)) for n in list(text.library_files())[:50]])"
    )
    run = [sys.executable, "-c", code]
    seen = {
        subprocess.run(run, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
        for seed in "12"
    }
    assert len(seen) == 1


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_held_out_part_gets_its_share_of_names(share: float) -> None:
    held_out = sum(text.is_held_out(f"package{index}/module.py", share) for index in range(4000))
    # Four standard deviations of a binomial.
    assert abs(held_out - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


def test_one_long_file_is_not_the_whole_sample(tmp_path: Path) -> None:
    root = write_files(tmp_path, {"long.py": 10_000, "short.py": 20})
    rows = list(text.sequences(list(text.library_files(root).values()), encode, 0, 10))
    assert len(rows) == text.SEQUENCES_PER_FILE + 2
    assert all(len(row) == 10 and len(set(row)) == 1 for row in rows)


def test_separator_follows_each_file(tmp_path: Path) -> None:
    root = write_files(tmp_path, {"a.py": 3})
    assert list(text.sequences([root / "a.py"], encode, 7, 4)) == [[65, 65, 65, 7]]


@pytest.mark.parametrize(
    "name", ["test/a.py", "json/tests/a.py", "site-packages/x/a.py", "encodings/cp437.py", "notes.txt"]
)
def test_tests_tables_and_installed_packages_are_left_out(tmp_path: Path, name: str) -> None:
    root = write_files(tmp_path, {"kept.py": 5, name: 5})
    assert list(text.library_files(root)) == ["kept.py"]


def test_declared_encoding_is_honoured(tmp_path: Path) -> None:
    file = tmp_path / "latin.py"
    file.write_bytes("# -*- coding: latin-1 -*-\n# café".encode("latin-1"))
    assert text.read_source(file).endswith("café")


def test_too_little_text_names_the_field_and_the_way_out(tmp_path: Path) -> None:
    root = write_files(tmp_path, {f"m{index}.py": 9 for index in range(20)})
    with pytest.raises(ConfigError, match=r"train_sequences=500.*only \d+ full sequences.*Ask for fewer"):
        text.standard_library(encode, 0, length=10, train_sequences=500, held_out_sequences=1, root=root)


def test_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no Python source"):
        text.library_files(tmp_path)

"""Real text that every machine has: the sources and docstrings of Python's standard library, split by file."""

import hashlib
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kpt_lightning.errors import ConfigError

Encode = Callable[[str], list[int]]

# Tables of code points, installed packages and tests say little about how people write.
LEFT_OUT = frozenset({"encodings", "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

# One long module must not be the whole sample.
SEQUENCES_PER_FILE = 8


@dataclass(frozen=True, slots=True)
class Corpus:
    """Packed token sequences; no file gives to both parts.

    Attributes:
        train: Token ids, int64, shape ``(train sequences, length)``.
        held_out: Token ids, int64, shape ``(held-out sequences, length)``.
    """

    train: Tensor
    held_out: Tensor


def rank_of(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, the same on every machine (BLAKE2b of the UTF-8 bytes)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big") / 2**48


def is_held_out(name: str, share: float) -> bool:
    """Whether the file of this name belongs to the held-out part, which gets ``share`` of all names."""
    return rank_of(name) < share


def library_files(root: Path | None = None) -> dict[str, Path]:
    """The Python sources below a folder, in an order that depends on their names alone.

    Args:
        root: Folder to read; None takes the standard library of the running Python.

    Returns:
        Path below the root with forward slashes, such as ``"json/decoder.py"`` -> file.

    Raises:
        ConfigError: Where the folder holds no Python source.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    names = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    kept = {name: path for name, path in names.items() if not LEFT_OUT.intersection(name.split("/"))}
    if not kept:
        raise ConfigError("root", str(root), "it holds no Python source file", "Name a folder with .py files")
    return {name: kept[name] for name in sorted(kept, key=lambda name: hashlib.sha256(name.encode()).digest())}


def read_source(path: Path) -> str:
    """The text of a Python source in the encoding that it declares."""
    with tokenize.open(path) as file:
        return file.read()


def sequences(files: Sequence[Path], encode: Encode, separator: int, length: int) -> Iterator[list[int]]:
    """Full sequences of ``length`` tokens, file after file, a separator token after each file.

    A sequence never spans two files; at most ``SEQUENCES_PER_FILE`` come from one, and a rest is dropped.
    """
    for path in files:
        tokens = [*encode(read_source(path)), separator]
        count = min(len(tokens) // length, SEQUENCES_PER_FILE)
        yield from (tokens[start * length : (start + 1) * length] for start in range(count))


def take(source: Iterator[list[int]], count: int, part: str, seed: int) -> Tensor:
    """The first ``count`` sequences, shuffled, as one tensor, int64, shape ``(count, length)``.

    Raises:
        ConfigError: Where the source holds fewer.
    """
    rows = [row for _, row in zip(range(count), source, strict=False)]
    if len(rows) < count:
        rule = f"the text gives only {len(rows)} full sequences for this part"
        raise ConfigError(f"{part}_sequences", count, rule, "Ask for fewer or for shorter ones")
    return torch.tensor(rows, dtype=torch.int64)[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]


def standard_library(
    encode: Encode,
    separator: int,
    *,
    length: int,
    train_sequences: int,
    held_out_sequences: int,
    held_out_share: float = 0.1,
    seed: int = 0,
    root: Path | None = None,
) -> Corpus:
    """Text of the standard library, tokenized and packed; the same Python and tokenizer give the same tensors.

    Args:
        encode: Text to token ids, without special tokens.
        separator: Token id put after each file, usually the end-of-text token.
        length: Tokens in a sequence.
        train_sequences: Sequences wanted for training.
        held_out_sequences: Sequences wanted for the held-out part.
        held_out_share: Share of the file names that is held out, in (0, 1).
        seed: Of the order of the sequences.
        root: Another folder of Python sources.

    Raises:
        ConfigError: Where the text is too small for what was asked.
    """
    files = library_files(root)
    parts = {
        part: [path for name, path in files.items() if is_held_out(name, held_out_share) == (part == "held_out")]
        for part in ("train", "held_out")
    }
    return Corpus(
        train=take(sequences(parts["train"], encode, separator, length), train_sequences, "train", seed),
        held_out=take(sequences(parts["held_out"], encode, separator, length), held_out_sequences, "held_out", seed),
    )

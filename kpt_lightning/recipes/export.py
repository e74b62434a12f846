"""Writing a trained model as a Hugging Face folder, whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from kpt_lightning.errors import ConfigError
from kpt_lightning.huggingface.atomic_folder import Place, exchange, flush, staged
from kpt_lightning.recipes.adapters import without_peft_notes
from kpt_lightning.recipes.task import Task

if TYPE_CHECKING:
    from peft import PeftModel


def check_output(output: Path | None, *, overwrite: bool) -> None:
    """Before anything is loaded: the folder is free or may be replaced.

    Raises:
        ConfigError: It is a file, holds something, or cannot be made or exchanged.
    """
    if output is None:
        return
    if output.exists() and not output.is_dir():
        raise ConfigError("output", str(output), "is a file", "Name a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConfigError("output", str(output), "is not empty", "Name another folder, or allow it with --overwrite")
    place = Place.of(output)
    if place.beside == place.target:
        rule = "is a working directory or a mount point, which cannot be exchanged as a whole"
        raise ConfigError("output", str(output), rule, "Name a folder below it")
    parent = next(each for each in output.absolute().parents if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError("output", str(output), f"cannot be made in {parent}", "Name a folder that can be written")


def write(task: Task, model: nn.Module, output: Path) -> None:
    """Export beside the place and exchange the two: a stop at any moment leaves the old folder or the new one.

    Args:
        task: Whose ``export`` writes.
        model: Unwrapped.
        output: Replaced where it exists.
    """
    place = Place.of(output)
    with staged(place, "finetune") as folder:
        task.export(model, folder)
        flush(folder)
        if not place.target.is_dir():
            folder.rename(place.target)
        elif not exchange(folder, place.target):
            place.target.rename(place.old)
            folder.rename(place.target)
            shutil.rmtree(place.old)


def save(model: nn.Module, processor: Any, folder: Path) -> None:
    """Weights as safetensors, config and processor: ``from_pretrained(folder)`` of transformers or peft reads it.

    Args:
        model: Of transformers, or of peft, which writes its adapters alone.
        processor: Tokenizer or image processor.
        folder: Exists.
    """
    model.save_pretrained(folder)  # type: ignore[operator]
    processor.save_pretrained(folder)


def save_merged(model: "PeftModel", load_base: Callable[[], nn.Module], processor: Any, folder: Path) -> None:
    """As :func:`save`, with the adapters added to the weights of the model as it came, in full precision.

    Args:
        model: Adapters on a base that may be quantized; it stays as it is.
        load_base: Loads the base anew.
        processor: As in :func:`save`.
        folder: As in :func:`save`.
    """
    from peft import PeftModel

    with TemporaryDirectory() as adapters, without_peft_notes():
        model.save_pretrained(adapters)
        merged = PeftModel.from_pretrained(load_base(), adapters).merge_and_unload()
    save(merged, processor, folder)

"""What happens to an image before the model: the settings of a transformers image processor, applied by torch alone.

transformers' own processors need Pillow or torchvision, which training on tensors does not.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes import minilm

MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Number of a resampling filter, https://pillow.readthedocs.io/en/stable/reference/Image.html#resampling-filters."""


@dataclass(frozen=True, slots=True)
class ImagePreparation:
    """Resizing, scaling and normalization.

    Attributes:
        settings: As in a ``preprocessor_config.json``.
    """

    settings: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse what would not be done.

        Raises:
            ConfigError: The settings ask for cropping or an unknown way of resizing.
        """
        settings = self.settings
        if settings.get("do_center_crop"):
            raise ConfigError("do_center_crop", True, "images are not cropped here", "Take a model without it")
        size = settings.get("size", {})
        if settings["do_resize"] and not {"height", "width"} <= size.keys():
            raise ConfigError("size", size, "it names no height and width", "Take a model with a fixed image size")
        if settings["do_resize"] and settings.get("resample", 2) not in MODES:
            raise ConfigError("resample", settings["resample"], "it is not known here", f"Known: {sorted(MODES)}")

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare images.

        Args:
            images: uint8, shape ``(images, 3, rows, columns)``.

        Returns:
            float32, shape ``(images, 3, height, width)``.
        """
        settings, pixels = self.settings, images.float()
        size = (settings["size"]["height"], settings["size"]["width"]) if settings["do_resize"] else images.shape[-2:]
        if tuple(images.shape[-2:]) != tuple(size):
            mode = MODES[settings.get("resample", 2)]
            smooth = mode != "nearest-exact"
            pixels = functional.interpolate(pixels, size, mode=mode, antialias=smooth).round().clamp(0, 255)
        if settings["do_rescale"]:
            pixels = pixels * settings["rescale_factor"]
        if settings["do_normalize"]:
            mean, spread = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
            pixels = (pixels - mean) / spread
        return pixels

    def save_pretrained(self, folder: Path) -> None:
        """Write ``preprocessor_config.json``, which ``AutoImageProcessor`` reads."""
        text = json.dumps(self.settings, indent=2, sort_keys=True)
        (Path(folder) / "preprocessor_config.json").write_text(f"{text}\n", encoding="utf-8")


def for_size(pixels: int) -> ImagePreparation:
    """Of a new vision transformer: scaled to -1..1, as ``ViTImageProcessor`` does by default."""
    half = [0.5, 0.5, 0.5]
    return ImagePreparation(
        {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True, "size": {"height": pixels, "width": pixels}, "resample": 2,
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": half, "image_std": half,
        }
    )  # fmt: skip


def of_model(name: str) -> ImagePreparation:
    """Of a pretrained model.

    Args:
        name: A Hugging Face folder or a name of the hub.

    Raises:
        ConfigError: It has no ``preprocessor_config.json``, or asks for what is not done here.
        MissingDependencyError: Where transformers is absent.
    """
    place = minilm.place_of(name)
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(place)
    except OSError as error:
        raise ConfigError("model", name, "has no preprocessor_config.json", "Add that file to the folder") from error
    defaults = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    return ImagePreparation({**defaults, **settings})

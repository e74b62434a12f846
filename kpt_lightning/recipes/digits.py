"""scikit-learn's 1,797 handwritten digits as images of 8-bit pixels.

They are the test part of https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits, written by
13 people, and stand in the installed package: nothing is downloaded.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kpt_lightning.optional import SCIKIT_LEARN

LABELS = tuple("0123456789")
SIZE = 8
"""Rows and columns of an image."""
LARGEST = 16
"""Largest value of a pixel in the source, which counts the dark dots of 4 x 4."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Images and what they show.

    Attributes:
        images: uint8 in 0..255, shape ``(images, 3, 8, 8)``: three equal channels, as image models expect.
        labels: int64 in 0..9, shape ``(images,)``.
    """

    images: Tensor
    labels: Tensor

    def part(self, start: int, end: int) -> Self:
        """The images from ``start`` to before ``end``."""
        return type(self)(self.images[start:end], self.labels[start:end])


def read_digits() -> Digits:
    """All images, in the order of the source.

    Raises:
        MissingDependencyError: Where scikit-learn is absent.
    """
    SCIKIT_LEARN.require("the data set digits")
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (torch.from_numpy(data.images) * (255 / LARGEST)).round().to(torch.uint8)
    return Digits(images[:, None].repeat(1, 3, 1, 1), torch.from_numpy(data.target).to(torch.int64))


def split(digits: Digits, share: float) -> tuple[Digits, Digits]:
    """Images to train on and held-out ones, the last ``share`` of all, in (0, 1).

    Neighbours in the source are mostly of one writer, so a random split would measure how well a hand that was seen in
    training is read.
    """
    count = len(digits.labels)
    border = count - max(1, round(count * share))
    return digits.part(0, border), digits.part(border, count)

import pytest
import torch

from kpt_lightning import optional
from kpt_lightning.errors import MissingDependencyError
from kpt_lightning.recipes import digits

needs_digits = pytest.mark.skipif(not optional.SCIKIT_LEARN.available(), reason="scikit-learn is not installed")


@needs_digits
def test_images_have_three_equal_channels_over_the_whole_range() -> None:
    data = digits.read_digits()
    assert data.images.shape == (1797, 3, 8, 8)
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert (int(data.images.min()), int(data.images.max())) == (0, 255)
    assert all(torch.equal(data.images[:, 0], data.images[:, channel]) for channel in (1, 2))
    assert data.labels.unique().tolist() == list(range(10))


@needs_digits
@pytest.mark.parametrize(("share", "count"), [(0.2, 359), (0.1, 180), (0.0001, 1)])
def test_held_out_part_is_the_end_and_nothing_is_in_both(share: float, count: int) -> None:
    data = digits.read_digits()
    train, held_out = digits.split(data, share)
    assert len(held_out.labels) == count
    assert torch.equal(torch.cat([train.images, held_out.images]), data.images)
    assert torch.equal(torch.cat([train.labels, held_out.labels]), data.labels)


def test_missing_package_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = optional.OptionalPackage("no_such_module_here", "scikit-learn", "finetune", "digits")
    monkeypatch.setattr(digits, "SCIKIT_LEARN", absent)
    with pytest.raises(MissingDependencyError, match=r"digits needs scikit-learn.*kpt-lightning\[finetune\]"):
        digits.read_digits()

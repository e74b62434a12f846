"""A Trainer's fit on two cores in a fraction of a second."""

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from tests.callbacks.small_fits import Net, Rows, callback_for


@pytest.fixture
def fit(tmp_path):
    """Fit with a callback that ignores regressions: two runs on a busy machine may differ by anything."""

    def run(module=None, callback=None, *, rows=160, data=None, val=None, ckpt_path=None, callbacks=(), **options):
        callback = callback or callback_for(tmp_path, on_regression="ignore")
        defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, callbacks=[callback, *callbacks], **{**defaults, **options},
        )  # fmt: skip
        data = DataLoader(Rows(rows), batch_size=4) if data is None else data
        trainer.fit(module or Net(), data, val, ckpt_path=ckpt_path)
        return callback

    return run

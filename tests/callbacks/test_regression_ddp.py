"""Two real processes over gloo."""

import subprocess
import sys

import pytest

from kpt_lightning.tracking.store import RunStore

SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from kpt_lightning.callbacks import RegressionCallback

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

if __name__ == "__main__":
    callback = RegressionCallback(sys.argv[1], on_regression="fail")
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )
    trainer.fit(Net(), DataLoader(torch.randn(160, 8), batch_size=4))
    print(f"rank {trainer.global_rank} has record: {callback.record is not None}", flush=True)
"""


@pytest.fixture
def run_two_ranks(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)

    def run(history):
        command = [sys.executable, "-W", "ignore", str(tmp_path / "train.py"), str(history)]
        return subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=tmp_path, check=False)

    return run


def test_rank_0_writes_one_record_of_two_processes(run_two_ranks, tmp_path):
    answer = run_two_ranks(tmp_path / "runs.sqlite")
    assert answer.returncode == 0, answer.stderr[-2000:]
    (record,) = RunStore(tmp_path / "runs.sqlite").all()
    assert record.key.device_count == 2
    assert record.key.strategy == "DDPStrategy"
    assert record.details["steps"] == 20
    assert answer.stdout.count("first run of this key") == 1
    assert "rank 0 has record: True" in answer.stdout
    assert "rank 1 has record: False" in answer.stdout


def test_an_unreadable_history_ends_all_ranks_and_none_hangs(run_two_ranks, tmp_path):
    (tmp_path / "runs.sqlite").write_bytes(b"not a database" * 100)
    answer = run_two_ranks(tmp_path / "runs.sqlite")
    assert answer.returncode != 0
    assert "cannot be read or written" in answer.stderr

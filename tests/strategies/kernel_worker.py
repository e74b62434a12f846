"""Two processes train a Llama through the FP8 kernels; each leaves its plan and weights in a folder. No test module."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from kpt_lightning import KptStrategy
from kpt_lightning.precision.gemm import count_gemms
from kpt_lightning.precision.kernel_sizes import at_every_size
from tests.strategies.test_float8_kernels import CONFIG, Language, network


def main() -> None:
    module = Language(network("llama"))
    # Lightning gives each process its own half.
    ids = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        strategy=KptStrategy(CONFIG), max_epochs=1, accelerator="cpu", devices=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with at_every_size(), count_gemms() as counts:
        trainer.fit(module, DataLoader(ids, batch_size=4))  # type: ignore[arg-type]
    weights = [float(each.double().sum()) for each in module.parameters()]
    told = {
        "rank": trainer.global_rank, "plan": trainer.strategy.plan.to_dict()["changes"], "merged": counts.merged,
        "weights": weights, "losses": module.losses,
    }  # fmt: skip
    (Path(sys.argv[1]) / f"{trainer.global_rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()

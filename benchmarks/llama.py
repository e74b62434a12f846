"""A causal language model of a Llama shape in a plain LightningModule, and its data. Knows nothing of kpt_lightning."""

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

# https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
SHAPES = {
    "1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, rms_norm_eps=1e-5,
    ),
    # https://huggingface.co/meta-llama/Llama-3.2-3B/blob/main/config.json
    "3b": dict(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, rms_norm_eps=1e-5,
    ),
    # https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
    "8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False, rms_norm_eps=1e-5,
    ),
    "tiny": dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-5,
    ),
}  # fmt: skip


class CausalLM(LightningModule):
    """What a user writes: a transformers model, its own loss, AdamW."""

    def __init__(
        self, shape: str, learning_rate: float, vocab_size: int | None = None, warmup: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        settings = dict(SHAPES[shape], max_position_embeddings=131072, use_cache=False)
        if vocab_size is not None:
            settings["vocab_size"] = vocab_size
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            self.model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
        self.learning_rate, self.warmup = learning_rate, warmup

    def blocks(self) -> Sequence[torch.nn.Module]:
        """The repeated ones."""
        return self.model.model.layers

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("held_out_loss", self.model(input_ids=batch, labels=batch).loss, batch_size=batch.shape[0])

    def configure_optimizers(self) -> Any:
        fused = torch.cuda.is_available()
        optimizer = torch.optim.AdamW(
            self.parameters(), self.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
        )
        if not self.warmup:
            return optimizer
        rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rise, "interval": "step"}}


class Tokens(Dataset[torch.Tensor]):
    """(count, length) token ids."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.ids[index]


def random_loader(vocab_size: int, batch: int, length: int, steps: int) -> DataLoader[torch.Tensor]:
    """Uniform random tokens, new ones each step."""
    ids = torch.randint(0, vocab_size, (batch * steps, length), generator=torch.Generator().manual_seed(0))
    return DataLoader(Tokens(ids), batch_size=batch, pin_memory=torch.cuda.is_available())


def text_loaders(
    cache: Path, vocab_size: int, batch: int, length: int, steps: int, held_out: int
) -> tuple[DataLoader[torch.Tensor], DataLoader[torch.Tensor]]:
    """Sources of the installed packages, byte-pair encoded; every 20th file is held out.

    Args:
        cache: Where the token ids are kept between the processes of one run.
        vocab_size: Of the tokenizer that is trained on the text.
        batch: Sequences a step.
        length: Tokens a sequence.
        steps: Training steps.
        held_out: Held-out steps.
    """
    if not cache.exists():
        files = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
        sides = [[], []]
        for number, file in enumerate(files):
            sides[number % 20 == 0].append(file)
        needed = [batch * length * steps, batch * length * held_out]
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_encode(sides, needed, vocab_size), cache)
    train, held = torch.load(cache)
    train, held = train[: batch * steps * length].view(-1, length), held[: batch * held_out * length].view(-1, length)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    pin = torch.cuda.is_available()
    return (
        DataLoader(Tokens(train[order]), batch_size=batch, pin_memory=pin),
        DataLoader(Tokens(held), batch_size=batch, pin_memory=pin),
    )


def _encode(sides: list[list[Path]], needed: list[int], vocab_size: int) -> list[torch.Tensor]:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(_texts(sides[0][::10]), vocab_size=vocab_size, show_progress=False)
    encoded = []
    for files, count in zip(sides, needed, strict=True):
        ids: list[int] = []
        for text in _texts(files):
            ids += tokenizer.encode(text).ids
            if len(ids) >= count:
                break
        if len(ids) < count:
            raise SystemExit(f"the installed packages hold {len(ids)} tokens, {count} are needed")
        encoded.append(torch.tensor(ids[:count]))
    return encoded


def _texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if len(text) > 200:
            yield text

"""Causal language model fine-tuning with LoRA: the settings and an ordinary LightningModule."""

import warnings
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import PEFT

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

# Names of the seven linear layers in a block of the Llama family.
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneConfig:
    """Every setting of one fine-tuning run.

    Attributes:
        steps: Optimizer steps.
        batch_size: Sequences in a step.
        sequence_length: Tokens in a sequence.
        held_out_sequences: Sequences that the held-out loss is the mean over.
        learning_rate: Peak rate of AdamW.
        warmup_steps: Steps in which the rate rises linearly; afterwards it falls linearly to a tenth.
        lora_rank: Rank of the adapters.
        lora_alpha: Scale of the adapters, applied as ``lora_alpha / lora_rank``.
        target_modules: Last part of the names of the linear layers that get an adapter.
        seed: Of adapters and order of the text.
    """

    steps: int
    batch_size: int
    sequence_length: int
    held_out_sequences: int
    learning_rate: float
    warmup_steps: int
    lora_rank: int
    lora_alpha: int
    target_modules: tuple[str, ...]
    seed: int

    def __post_init__(self) -> None:
        """Reject sizes that cannot run."""
        for name in ("steps", "batch_size", "held_out_sequences", "lora_rank", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "it must be 1 or more", "Give a positive whole number")
        if self.sequence_length < 2:
            rule = "a next token exists only from two tokens on"
            raise ConfigError("sequence_length", self.sequence_length, rule, "Give 2 or more")
        if not 0 <= self.warmup_steps < self.steps:
            rule = f"it must be 0 or more and below steps={self.steps}"
            raise ConfigError("warmup_steps", self.warmup_steps, rule, "Lower it or train longer")


def smollm2_lora(**changes: object) -> FineTuneConfig:
    """LoRA on SmolLM2-135M, sized for minutes on two CPU cores.

    Args:
        **changes: Fields of :class:`FineTuneConfig` to replace.

    Raises:
        ConfigError: For an unknown field or an impossible value.
    """
    known = [field.name for field in fields(FineTuneConfig)]
    for name in changes:
        if name not in known:
            raise ConfigError(name, changes[name], "it is no setting of this recipe", f"Known: {', '.join(known)}")
    config = FineTuneConfig(
        steps=32,
        batch_size=2,
        sequence_length=256,
        held_out_sequences=16,
        learning_rate=1e-3,
        warmup_steps=3,
        lora_rank=8,
        lora_alpha=16,
        target_modules=LLAMA_LINEARS,
        seed=0,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def add_lora(model: nn.Module, config: FineTuneConfig) -> nn.Module:
    """Freeze the model and add trainable low-rank adapters to its linear layers.

    Raises:
        MissingDependencyError: Where peft is absent.
    """
    PEFT.require("LoRA")
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers by an old name; neither is the user's doing.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted: nn.Module = get_peft_model(model, lora)
    return adapted


class CausalLM(LightningModule):
    """Next-token training of any Hugging Face causal language model.

    A batch is int64 token ids of shape ``(batch, length)``, every token is real (no padding), so that attention
    stays causal without a mask tensor.
    """

    def __init__(self, model: nn.Module, config: FineTuneConfig) -> None:
        """Wrap the model.

        Args:
            model: Called as ``model(input_ids=, labels=)``; answers with ``.loss``.
            config: The run's settings.
        """
        super().__init__()
        self.model = model.train()  # from_pretrained leaves it in eval mode
        self.config = config

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, in nats, a scalar."""
        loss = self.model(input_ids=tokens, labels=tokens).loss
        assert isinstance(loss, Tensor)
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of one step."""
        loss = self.loss(batch)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the held-out loss, weighted by the sequences in the batch."""
        self.log("held_out_loss", self.loss(batch), batch_size=len(batch))

    def configure_optimizers(self) -> "OptimizerLRSchedulerConfig":
        """AdamW over what is trainable, with a linear rise and a linear fall."""
        config = self.config
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=0.0)

        def factor(step: int) -> float:
            if step < config.warmup_steps:
                return (step + 1) / (config.warmup_steps + 1)
            return max(0.1, 1 - (step - config.warmup_steps) / (config.steps - config.warmup_steps))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

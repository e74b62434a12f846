"""Model FLOPs of one training step, by formula.

A matmul of ``(T, K)`` by ``(K, N)`` takes ``2 T K N`` floating-point operations. Forward has one per linear layer,
backward one for the gradient of the input and one for that of the weight, as in PaLM, appendix B:
https://arxiv.org/abs/2204.02311. Recomputation by activation checkpointing is not model work and never counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kpt_lightning.decision import Rejected


@dataclass(frozen=True, slots=True)
class FlopCount:
    """FLOPs of one forward and backward pass.

    Attributes:
        flops: Forward and backward.
        forward: The forward part.
        formula: How they were counted, for a person.
        left_out: What was not counted.
    """

    flops: float
    forward: float
    formula: str
    left_out: tuple[str, ...]

    @property
    def backward(self) -> float:
        """The backward part."""
        return self.flops - self.forward


def training_flops(
    model: nn.Module, tokens: int, sequence_length: int | None = None, *, causal: bool | None = None
) -> FlopCount | Rejected:
    """Count the FLOPs of a forward and backward pass.

    Args:
        model: Linear layers (``nn.Linear`` and transformers' ``Conv1D``), with attention where some ``config`` of
            transformers' form is found in it. Modules are taken to run in the order in which they are registered.
        tokens: Rows that pass through each linear layer: batch times sequence length, or the batch of an MLP.
        sequence_length: Tokens that attend to each other; needed where there is attention.
        causal: Count half of the attention, as the masked half is no model work. None decides by the class names:
            causal where one holds ``CausalLM`` or ``LMHead``.

    Returns:
        The count, or Rejected where a layer has no formula here.
    """
    config = _config(model)
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts")):
        return Rejected("flops", "mixture of experts: the router decides how many weights a token meets")
    strange = next(_unknown_weights(model), None)
    if strange is not None:
        return Rejected("flops", f"no formula for {strange}; give flops_per_step")
    causal = _is_causal(model) if causal is None else causal
    forward, backward = _linear_flops(model, tokens)
    if not forward:
        return Rejected("flops", "the model has no linear layer; give flops_per_step")
    formula, left_out = "linear: 2KN per token forward, 2KN input gradient, 2KN weight gradient if trained", []
    if config is None:
        left_out.append("attention: no config with num_hidden_layers and hidden_size found")
    elif sequence_length is None:
        return Rejected("flops", "attention needs the sequence length; give tokens as a 2-D integer tensor")
    else:
        attention = _attention_flops(config, tokens, sequence_length) // (2 if causal else 1)
        forward, backward = forward + attention, backward + 2 * attention
        formula += (
            f"; attention: {'2Sd (causal)' if causal else '4Sd'} per token and layer forward, twice that backward"
        )
        if getattr(config, "sliding_window", None):
            left_out.append("the sliding window: attention is counted over the whole sequence")
    left_out += ["norms, activations, softmax, embeddings, loss and optimizer", "recomputation"]
    return FlopCount(float(forward + backward), float(forward), formula, tuple(left_out))


def _linear_flops(model: nn.Module, tokens: int) -> tuple[int, int]:
    forward, backward = 0, 0
    trained_before = False
    for module in model.modules():
        size = _linear_size(module)
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        if size is not None:
            work = 2 * tokens * size[0] * size[1]
            weight = module.weight
            forward += work
            # autograd computes an input's gradient only if something upstream is trained
            backward += work * trained_before + work * bool(isinstance(weight, torch.Tensor) and weight.requires_grad)
        trained_before = trained_before or trained
    return forward, backward


def _linear_size(module: nn.Module) -> tuple[int, int] | None:
    """``(K, N)`` from the layer's attributes: a sharded or quantized weight has another shape."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(nf := getattr(module, "nf", None), int):
        nx = getattr(module, "nx", None)
        weight = module.weight
        return (nx if isinstance(nx, int) else int(weight.shape[0]) if isinstance(weight, torch.Tensor) else 0), nf
    return None


def _unknown_weights(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if _linear_size(module) is not None or isinstance(module, nn.Embedding):
            continue
        for weight_name, weight in module.named_parameters(recurse=False):
            if weight.dim() >= 2:
                where = f"{name}.{weight_name}" if name else weight_name
                yield f"{type(module).__name__} ({where}, shape {tuple(weight.shape)})"


def _config(model: nn.Module) -> Any | None:
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "num_hidden_layers", None) and getattr(config, "hidden_size", None):
            return config
    return None


def _attention_flops(config: Any, tokens: int, sequence_length: int) -> int:
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 4 * sequence_length * heads * head_dim * int(config.num_hidden_layers) * tokens


def _is_causal(model: nn.Module) -> bool:
    names = {type(module).__name__ for module in model.modules()}
    return any("CausalLM" in name or "LMHead" in name for name in names)

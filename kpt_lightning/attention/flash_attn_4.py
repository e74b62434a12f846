"""What torch's glue for FlashAttention 4 imports: two functions of flash-attn-4 that return what the glue unpacks.

flash-attn-4 4.0.0b36 returns five values forward, torch 2.11 to 2.13 unpack two:
https://github.com/pytorch/pytorch/blob/main/torch/nn/attention/_fa4.py
"""

from typing import Any

from torch import Tensor


def _flash_attn_fwd(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of each row."""
    from flash_attn.cute import interface

    out, logsumexp, *_ = interface._flash_attn_fwd(*args, **kwargs)
    return out, logsumexp


def _flash_attn_bwd(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    from flash_attn.cute import interface

    query, key, value, *_ = interface._flash_attn_bwd(*args, **kwargs)
    return query, key, value

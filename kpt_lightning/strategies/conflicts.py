"""Settings that contradict each other: Lightning ignores one of the two in silence, these refuse."""

import torch

from kpt_lightning.config import KptConfig
from kpt_lightning.errors import ConfigError
from kpt_lightning.strategies.connector import Request


def check_single(request: Request, name: str) -> None:
    """Refuse ``devices`` or ``num_nodes`` beside a strategy of one device.

    Args:
        request: What the user passed to Trainer or Fabric.
        name: The strategy, for the message.

    Raises:
        ConfigError: More than one device or node was asked for.
    """
    asked = {
        "devices": len(request.parallel_devices) if request.devices != "auto" else 1,
        "num_nodes": request.num_nodes,
    }
    given = {"devices": request.devices, "num_nodes": request.num_nodes}
    for field, count in asked.items():
        if count > 1:
            raise ConfigError(
                f"{request.owner}({field})", given[field], f"contradicts {name}, which runs on one device",
                f"Set {field}=1, or use KptStrategy() or KptDDP()",
            )  # fmt: skip


def check_devices(request: Request, own: list[torch.device] | None, name: str) -> None:
    """Refuse ``devices`` beside a strategy that was given its own ``parallel_devices``.

    Args:
        request: What the user passed to Trainer or Fabric.
        own: The strategy's devices.
        name: The strategy, for the message.

    Raises:
        ConfigError: The numbers differ.
    """
    if own is None or request.devices == "auto":
        return
    flag = request.connector._devices_flag
    asked = len(flag) if isinstance(flag, list | tuple) else flag
    if asked != len(own):
        raise ConfigError(
            f"{request.owner}(devices)", request.devices, f"contradicts {name}(parallel_devices=...), which names "
            f"{len(own)} devices", "Remove one of the two",
        )  # fmt: skip


def check_precision(config: KptConfig, request: Request, field: str, value: object) -> None:
    """Refuse ``precision=`` or a precision plugin beside a precision of the strategy's own.

    Args:
        config: The strategy's settings.
        request: What the user passed to Trainer or Fabric.
        field: "precision" or "plugins".
        value: What was given there.

    Raises:
        ConfigError: The strategy has a precision other than "auto".
    """
    if config.precision != "auto":
        raise ConfigError(
            f"{request.owner}({field})", value, f"contradicts KptStrategy(precision={config.precision!r}), which would "
            "make it ignored", f"Remove one of the two, {field} or KptStrategy's precision",
        )  # fmt: skip


def check_ignored(config: KptConfig, request: Request, field: str, value: object) -> None:
    """Refuse a float8 section where a precision of Lightning's own stays in charge.

    Args:
        config: The strategy's settings.
        request: What the user passed to Trainer or Fabric.
        field: "precision" or "plugins".
        value: What was given there.

    Raises:
        ConfigError: The section would be ignored.
    """
    if "float8" in config.model_fields_set:
        raise ConfigError(
            f"{request.owner}({field})", value, "leaves no FP8, and KptStrategy's float8 section would be ignored",
            f"Remove one of the two, {field} or the float8 section",
        )  # fmt: skip

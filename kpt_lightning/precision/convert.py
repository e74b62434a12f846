"""Which linear layers run in FP8, each with its reason; and the conversion itself, which can be undone.

Conversion puts the class Float8Linear on the module object that is there. Nothing is copied or replaced, so Parameter
objects, hooks, tied weights, state-dict keys, references that the user holds and an optimizer made before stay valid.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from kpt_lightning.config import Float8Config
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.hardware import HardwareProfile
from kpt_lightning.optional import TORCHAO
from kpt_lightning.precision.float8_linear import ALIGNMENT, Float8Linear, Float8Settings
from kpt_lightning.precision.foreign_linear import ForeignLinear, make_foreign
from kpt_lightning.precision.recipes import get_recipe
from kpt_lightning.precision.torchao_linear import torchao_linear

# Where FP8 does not win back its quantization on an H100: thresholds of torchao's auto filter
# (https://github.com/pytorch/ao/blob/main/torchao/float8/float8_linear_utils.py).
_SMALL_SIDE = 512


def float8_available(config: Float8Config, profile: HardwareProfile) -> Decision:
    """Whether this machine runs the recipe, or ``emulate`` is set."""
    recipe = get_recipe(config.recipe)
    if config.backend == "torchao" and not (there := TORCHAO.available()):
        return Rejected("fp8", f"float8.backend='torchao': {there.reason}")
    if config.emulate:
        return Accepted("fp8", f"recipe {recipe.name}, emulated in fp32 arithmetic: the numbers of FP8, not its speed")
    verdict = profile.supports("fp8_rowwise" if recipe.rowwise else "fp8_tensorwise")
    if not verdict:
        return Rejected("fp8", verdict.reason)
    return Accepted("fp8", f"recipe {recipe.name}; {verdict.reason}")


def decide_layers(model: nn.Module, config: Float8Config) -> list[Decision]:
    """One decision for each linear layer of ``model``: ``nn.Linear``, its subclasses, and transformers' Conv1D.

    Args:
        model: Any module; not changed.
        config: Filters.

    Returns:
        In the order of ``named_modules``; the subject is the module's name.
    """
    owners = _weight_owners(model)
    decisions: list[Decision] = []
    for name, module in model.named_modules():
        if _is_conv1d(module):
            decisions.append(Rejected(name, "Conv1D of transformers, which stores its weight transposed: no nn.Linear"))
        elif isinstance(module, nn.Linear):
            reason = _why_not(name, module, config, owners)
            shape = f"{module.in_features} -> {module.out_features}"
            decisions.append(Rejected(name, f"{shape}: {reason}") if reason else Accepted(name, shape))
    return decisions


def convert_to_float8(model: nn.Module, names: Iterable[str], config: Float8Config) -> list[nn.Linear]:
    """Make the named ``nn.Linear`` modules run in FP8, in place.

    Args:
        model: Module that holds them.
        names: Names from :func:`decide_layers`.
        config: Recipe, emulation and backend.

    Returns:
        The converted modules, for :func:`restore_linear`.

    Raises:
        ConfigError: A name is no plain ``nn.Linear`` of this model.
        MissingDependencyError: The backend is not installed.
    """
    settings = Float8Settings(get_recipe(config.recipe), config.emulate)
    modules = dict(model.named_modules())
    chosen: list[nn.Linear] = []
    for name in names:
        module = modules.get(name)
        if type(module) is not nn.Linear:
            found = "no module" if module is None else type(module).__name__
            raise ConfigError("plan.float8", name, f"is {found} in this model, not nn.Linear", "Make a new plan")
        chosen.append(module)
    with ExitStack() as undo:
        undo.callback(restore_linear, chosen)
        for module in chosen:
            _convert(module, settings, config.backend)
        undo.pop_all()
    return chosen


def _convert(module: nn.Linear, settings: Float8Settings, backend: str) -> None:
    if backend == "torchao":
        make_foreign(module, settings, lambda layer: torchao_linear(layer, settings))
        return
    module.__class__ = Float8Linear
    module.float8 = settings  # type: ignore[assignment]


def restore_linear(modules: Iterable[nn.Linear]) -> None:
    """Undo :func:`convert_to_float8`."""
    for module in modules:
        if isinstance(module, Float8Linear):
            if isinstance(module, ForeignLinear):
                del module.foreign
            del module.float8
            module.__class__ = nn.Linear  # type: ignore[assignment]


def _weight_owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    owners: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append((name, module))
    return owners


def _is_conv1d(module: nn.Module) -> bool:
    """The linear layer of GPT-2; told by name, for this layer imports no transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _why_not(
    name: str, module: nn.Linear, config: Float8Config, owners: dict[int, list[tuple[str, nn.Module]]]
) -> str | None:
    """The reason to leave a layer alone, or None."""
    return (
        _why_not_by_kind(module)
        or _why_not_by_name(name, module, config, owners)
        or _why_not_by_size(module.out_features, module.in_features, config)
    )


def _why_not_by_kind(module: nn.Linear) -> str | None:
    if isinstance(module, Float8Linear):
        return "runs in FP8 already"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear; its own behaviour would be lost"
    if "forward" in vars(module):
        return "its forward was replaced on the object by another library"
    if "weight" not in module._parameters:
        return "its weight is computed (weight_norm or alike), not a Parameter"
    if module.weight.numel() == 0:
        return "its weight is empty"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}"
    if (kind := type(module.weight.data)) not in (torch.Tensor, DTensor):
        return f"its weight is a {kind.__name__}, a tensor with behaviour of its own"
    return None


def _why_not_by_name(
    name: str, module: nn.Linear, config: Float8Config, owners: dict[int, list[tuple[str, nn.Module]]]
) -> str | None:
    if config.include and not any(fnmatchcase(name, pattern) for pattern in config.include):
        return "no pattern of float8.include names it"
    # A name in float8.include wins over the exclusions of this package, not over the user's.
    if not config.include or "exclude" in config.model_fields_set:
        for pattern in config.exclude:
            if fnmatchcase(name, pattern):
                return f"float8.exclude names it ({pattern!r})"
    if config.include:
        return None
    for other, owner in owners[id(module.weight)]:
        if not isinstance(owner, nn.Linear):
            return f"its weight is tied to {other!r} ({type(owner).__name__})"
    return None


def _why_not_by_size(rows: int, columns: int, config: Float8Config) -> str | None:
    if config.odd_dims == "skip" and (rows % ALIGNMENT or columns % ALIGNMENT):
        return f"sizes must be multiples of {ALIGNMENT}; float8.odd_dims='pad' would pad them"
    if not config.only_where_it_pays:
        return None
    if min(rows, columns) <= _SMALL_SIDE:
        return f"a side of {min(rows, columns)} is too small to win back quantization (limit {_SMALL_SIDE})"
    if config.recipe == "tensorwise":
        pays = columns > 4096 or rows > 1024
    elif config.recipe == "rowwise":
        pays = rows > 2048 and columns > 1024 and not (rows <= 4096 and columns <= 2048)
    else:
        pays = True
    return None if pays else f"recipe {config.recipe} does not win back quantization at this size"

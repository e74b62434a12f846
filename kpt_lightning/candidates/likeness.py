"""Grouping modules that are called alike, so that each group is compared once."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kpt_lightning.validation.calls import ModuleCall


def alike(modules: Mapping[str, nn.Module], calls: Mapping[str, ModuleCall]) -> list[list[str]]:
    """Names of modules in groups of one class, one set of attributes, children and parameters, and one form of call.

    Weights differ within a group, and gradients may be wanted for some of them only.
    """
    groups: dict[Any, list[str]] = {}
    for name, module in modules.items():
        groups.setdefault((_form(module), _call_form(calls.get(name))), []).append(name)
    return list(groups.values())


def _form(module: nn.Module) -> tuple[Any, ...]:
    parameters = tuple((name, None if each is None else _tensor(each)) for name, each in module._parameters.items())
    buffers = tuple((name, None if each is None else _tensor(each)) for name, each in module._buffers.items())
    children = tuple((name, _form(each)) for name, each in module._modules.items() if each is not None)
    plain = tuple((name, repr(value)) for name, value in vars(module).items() if not name.startswith("_"))
    return type(module), parameters, buffers, children, plain


def _call_form(call: ModuleCall | None) -> tuple[Any, ...] | None:
    if call is None:
        return None
    leaves = tree_leaves((call.args, call.kwargs, call.output))
    form = tuple(_tensor(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    return form, tuple(call.kwargs), call.autocast, call.training


def _tensor(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad

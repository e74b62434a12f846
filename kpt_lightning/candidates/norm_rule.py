"""What a norm computes, found by running it: RMS or layer norm, epsilon, offset of its weight, dtype of its result."""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kpt_lightning.candidates.liger import liger_rms_norm
from kpt_lightning.kernels.rms_norm import rms_norm
from kpt_lightning.validation.attempt import Done, Failure, attempt
from kpt_lightning.validation.calls import ModuleCall, TensorSpec
from kpt_lightning.validation.numerics import relative_error

Backend = Literal["torch", "liger", "kpt"]
Kind = Literal["rms", "layer"]
Result = Literal["input", "promoted", "weight", "float32"]

# Tried besides the numbers that the module itself holds, for code that has its epsilon written out.
_USUAL_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)

# fp32 arithmetic with another order of operations stays below; the smallest wrong guess at these scales does not.
_SAME = 1e-5
_SCALES = (1.0, 1e-2, 1e-4)

_KINDS: tuple[Kind, ...] = ("rms", "layer")
_RESULTS: tuple[Result, ...] = ("input", "promoted", "weight", "float32")

_FUSED = ("rms_norm", "layer_norm", "native_layer_norm", "_fused_rms_norm", "group_norm", "batch_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class NormRule:
    """A norm over the last dimension: ``x / size(x) * (offset + weight) + bias``.

    Attributes:
        kind: "rms" divides by the root of the mean square, "layer" subtracts the mean first.
        eps: Added to the mean square.
        offset: Added to the weight: 1.0 in Gemma.
        weight: Name of the parameter that multiplies.
        bias: Name of the one that is added, None without one.
        result: Dtype of the result: that of the "input", of the "weight", of both "promoted", or "float32".
        backend: Whose kernel computes it.
    """

    kind: Kind
    eps: float
    offset: float
    weight: str
    bias: str | None
    result: Result = "input"
    backend: Backend = "torch"

    def to_dict(self) -> dict[str, Any]:
        """JSON-like data, for ``NormRule(**data)``."""
        return asdict(self)


def fused_norm(x: Tensor, weight: Tensor, bias: Tensor | None, rule: NormRule) -> Tensor:
    """Compute a norm with one kernel; no weight is rounded.

    Args:
        x: (..., n).
        weight: (n,).
        bias: (n,) or None.
        rule: What to compute.
    """
    if rule.backend == "liger":
        return liger_rms_norm(x, weight, rule.eps, rule.offset).to(result_dtype(rule.result, x.dtype, weight.dtype))
    if rule.backend == "kpt":
        written = result_dtype(rule.result, x.dtype, weight.dtype)
        # All in fp32, rounded once: nearer than either rule of transformers.
        return rms_norm(x, weight, rule.eps, offset=rule.offset, casting="gemma", out_dtype=written)
    wide = torch.promote_types(x.dtype, weight.dtype)
    if rule.offset:
        # 1 + w keeps no small w in bf16.
        wide = torch.promote_types(wide, torch.float32)
    scale = weight.to(wide) + rule.offset if rule.offset else weight.to(wide)
    shift = None if bias is None else bias.to(wide)
    if rule.kind == "layer":
        out = F.layer_norm(x.to(wide), weight.shape, scale, shift, rule.eps)
    else:
        out = F.rms_norm(x.to(wide), weight.shape, scale, rule.eps)
        out = out if shift is None else out + shift
    return out.to(result_dtype(rule.result, x.dtype, weight.dtype))


def result_dtype(result: Result, x: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """The dtype that ``NormRule.result`` stands for."""
    if result == "input":
        return x
    if result == "weight":
        return weight
    return torch.float32 if result == "float32" else torch.promote_types(x, weight)


def vectors(module: nn.Module) -> list[str]:
    """Names of the parameters of a module that looks like a norm: one or two vectors of one size and nothing else.

    Returns:
        Empty where it does not.
    """
    own = {name: each for name, each in module._parameters.items() if each is not None}
    alone = not any(True for _ in module.children()) and not any(True for _ in module.buffers(recurse=False))
    sizes = {tuple(each.shape) for each in own.values()}
    is_norm = alone and len(own) in (1, 2) and len(sizes) == 1 and len(next(iter(sizes))) == 1
    return list(own) if is_norm else []


def find_rule(module: nn.Module, call: ModuleCall) -> NormRule | str:
    """Find what a norm computes by running copies of it on small random input.

    Args:
        module: With :func:`vectors`; not changed.
        call: A recorded call of it.

    Returns:
        The rule, or why there is none.
    """
    spec = _only_input(module, call)
    if isinstance(spec, str):
        return spec
    small = (*(min(size, 2) for size in spec.shape[:-1]), spec.shape[-1])
    probe = attempt(lambda: _probe(module, small, spec.device))
    if isinstance(probe, Failure):
        return f"it does not run on other input: {probe.text}"
    inputs, outputs, twin, fused = probe.value
    if fused:
        return f"it calls {fused} of torch already"
    rule, error = _closest(inputs, outputs, twin)
    if error > _SAME:
        return (
            f"it computes neither RMS nor layer norm: the closest, {rule.kind} norm with epsilon {rule.eps:g}"
            f"{' and 1 + weight' if rule.offset else ''}, is off by {error:.1e}"
        )
    result = _result(module, call, small, spec)
    if result is None:
        return "the dtype of its result is neither its input's nor its weight's, nor the wider of both, nor float32"
    return replace(rule, result=result)


def _only_input(module: nn.Module, call: ModuleCall) -> TensorSpec | str:
    given = [*call.args, *call.kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], TensorSpec):
        return f"it is called with {len(given)} arguments, not with one floating-point tensor"
    spec, size = given[0], next(iter(module.parameters())).shape[0]
    if spec.shape[-1:] != (size,):
        return f"its weight of {size} elements is not over the last dimension of {spec.shape}"
    if not isinstance(call.output, TensorSpec) or call.output.shape != spec.shape:
        return "it does not return one tensor of the shape of its input"
    return spec


class _Seen(TorchFunctionMode):
    """Notes which torch functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def _probe(
    module: nn.Module, shape: tuple[int, ...], device: torch.device
) -> tuple[list[Tensor], list[Tensor], nn.Module, str | None]:
    """Small inputs, what a float32 copy with random weights makes of them, the copy, and a fused function in it."""
    twin = copy.deepcopy(module).float()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in twin.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device=device))
    values = torch.randn(shape, generator=generator, device=device).add_(0.5)
    inputs = [values * scale for scale in _SCALES]
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _Seen() as seen:
        outputs = [twin(each.clone()) for each in inputs]
    return inputs, outputs, twin, next((name for name in _FUSED if name in seen.names), None)


def _closest(inputs: list[Tensor], outputs: list[Tensor], twin: nn.Module) -> tuple[NormRule, float]:
    """The rule with the smallest error on all inputs, relative to the outputs."""
    errors = [(max(map(_error(rule, twin), inputs, outputs)), index, rule) for index, rule in enumerate(_guesses(twin))]
    error, _, rule = min(errors, key=lambda each: each[:2])
    return rule, error


def _error(rule: NormRule, twin: nn.Module) -> Callable[[Tensor, Tensor], float]:
    def error(x: Tensor, out: Tensor) -> float:
        weight = getattr(twin, rule.weight).detach().double()
        bias = None if rule.bias is None else getattr(twin, rule.bias).detach().double()
        found = relative_error(fused_norm(x.double(), weight, bias, rule), out)
        return math.inf if math.isnan(found) else found

    return error


def _guesses(module: nn.Module) -> Iterable[NormRule]:
    held = [value for value in vars(module).values() if type(value) is float and 0 <= value < 1]
    names = vectors(module)
    roles = [(names[0], None)] if len(names) == 1 else [(names[0], names[1]), (names[1], names[0])]
    for kind, offset, (weight, bias) in itertools.product(_KINDS, (0.0, 1.0), roles):
        for eps in dict.fromkeys([*held, *_USUAL_EPSILONS]):
            yield NormRule(kind=kind, eps=eps, offset=offset, weight=weight, bias=bias)


def _result(module: nn.Module, call: ModuleCall, shape: tuple[int, ...], spec: TensorSpec) -> Result | None:
    """The rule for the dtype of the result that fits inputs of several dtypes."""
    weight = next(iter(module.parameters())).dtype
    seen: dict[torch.dtype, torch.dtype] = {}
    for dtype in dict.fromkeys([spec.dtype, torch.float32, call.autocast or torch.bfloat16]):
        x = torch.ones(shape, dtype=dtype, device=spec.device)
        with torch.no_grad(), torch.autocast(spec.device.type, dtype=call.autocast, enabled=call.autocast is not None):
            done = attempt(functools.partial(copy.deepcopy(module), x))
        if isinstance(done, Done):
            seen[dtype] = done.value.dtype
    for result in _RESULTS:
        if all(result_dtype(result, dtype, weight) is found for dtype, found in seen.items()):
            return result
    return None

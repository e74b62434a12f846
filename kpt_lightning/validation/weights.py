"""What parameters and buffers alone tell about a model: nothing runs, nothing is changed."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.validation.findings import listed


def check_weights(model: nn.Module) -> list[Decision]:
    """One decision each on data, finite values, devices, dtypes, trainable, and shared parameters."""
    checks = (_data, _finite, _devices, _dtypes, _trainable, _shared)
    return [check(model) for check in checks]


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that hold data, by name."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_lazy(tensor) and not tensor.is_meta:
            yield name, tensor


def extremes(tensor: Tensor) -> tuple[float, float] | None:
    """Least and greatest value of a tensor; NaN where it holds one.

    Returns:
        None for integers, for no elements, and for tensors that hold no plain numbers: quantized or of torch.func.
    """
    plain = tensor.detach()
    if hasattr(plain, "to_local"):
        plain = plain.to_local()
    if type(plain) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(plain):
        return None
    if plain.layout is not torch.strided:
        plain = plain.coalesce().values() if plain.layout is torch.sparse_coo else plain.to_dense()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    if not plain.is_floating_point() or plain.numel() == 0:
        return None
    # No reduction exists for 8-bit floating-point types.
    low, high = torch.aminmax(plain if plain.element_size() > 1 else plain.float())
    return float(low), float(high)


def _data(model: nn.Module) -> Decision:
    lazy = [name for name, each in model.named_parameters() if is_lazy(each)]
    lazy += [name for name, each in model.named_buffers() if is_lazy(each)]
    if lazy:
        return Rejected("data", f"{listed(lazy)} have no shape yet: run the model on one batch first")
    everything = [*model.named_parameters(), *model.named_buffers()]
    if meta := [name for name, each in everything if each.is_meta]:
        return Rejected(
            "data", f"{listed(meta)} are on the meta device and hold no data: load or initialize the weights"
        )
    count = sum(each.numel() for each in model.parameters())
    return Accepted("data", f"{count:,} parameters in {sum(1 for _ in model.parameters())} tensors hold data")


def _finite(model: nn.Module) -> Decision:
    broken, masks = [], []
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in _held(model):
        found = extremes(tensor)
        if found is None or all(math.isfinite(value) for value in found):
            continue
        # Attention masks kept as buffers hold -inf on purpose.
        if name in buffers and found[0] == -math.inf and found[1] < math.inf:
            masks.append(name)
        else:
            broken.append(f"{name} ({'NaN' if math.isnan(found[0]) else 'infinite'})")
    if broken:
        return Rejected("finite weights", f"{listed(broken)}: load a sound checkpoint, or initialize them again")
    noted = f"; {listed(masks)} hold -inf, as masks do" if masks else ""
    return Accepted("finite weights", f"no NaN and no infinity in parameters and buffers{noted}")


def _devices(model: nn.Module) -> Decision:
    places: dict[torch.device, list[str]] = defaultdict(list)
    for name, tensor in _held(model):
        places[tensor.device].append(name)
    if len(places) < 2:
        return Accepted("devices", f"all on {next(iter(places), 'no device')}")
    usual, *others = sorted(places, key=lambda device: -len(places[device]))
    text = "; ".join(f"{listed(places[device])} on {device}" for device in others)
    if hasattr(model, "hf_device_map"):
        return Accepted("devices", f"spread by the model's own device map over {len(places)} devices")
    return Rejected("devices", f"on {usual}, but {text}: move the whole model with model.to({str(usual)!r})")


def _dtypes(model: nn.Module) -> Decision:
    count: Counter[torch.dtype] = Counter()
    owners: dict[torch.dtype, list[str]] = defaultdict(list)
    mixed = []
    for name, module in model.named_modules():
        own = {each.dtype for each in module.parameters(recurse=False) if each.is_floating_point()}
        if len(own) > 1:
            mixed.append(f"{name or 'the model'} ({' and '.join(sorted(_short(each) for each in own))})")
        for dtype in own:
            owners[dtype].append(name or "the model")
        count.update(each.dtype for each in module.parameters(recurse=False) if each.is_floating_point())
    if mixed:
        return Rejected("dtypes", f"one module with two dtypes: {listed(mixed)}: cast it with .to(dtype)")
    if not count:
        return Accepted("dtypes", "no floating-point parameter")
    usual = count.most_common(1)[0][0]
    text = "; ".join(f"{_short(dtype)} in {listed(names)}" for dtype, names in owners.items() if dtype != usual)
    if torch.float64 in owners and len(owners) > 1:
        return Rejected(
            "dtypes", f"{_short(usual)}, but {text}: float64 among others is slow and rarely meant; cast it"
        )
    return Accepted("dtypes", f"{_short(usual)}, but {text}" if text else f"all {_short(usual)}")


def _trainable(model: nn.Module) -> Decision:
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    count = sum(1 for _ in model.parameters())
    if len(frozen) == count:
        rule = "the model has no parameter" if not count else "every parameter has requires_grad=False"
        return Rejected("trainable", f"{rule}: there is nothing to train; call requires_grad_() on what should learn")
    text = f"{len(frozen)} of {count} are frozen: {listed(frozen)}" if frozen else f"all {count} parameters"
    return Accepted("trainable", text)


def _shared(model: nn.Module) -> Decision:
    names: dict[int, list[str]] = defaultdict(list)
    memory: dict[tuple[torch.device, int], dict[int, str]] = defaultdict(dict)
    for name, each in model.named_parameters(remove_duplicate=False):
        names[id(each)].append(name)
        if type(each.data) is Tensor and not is_lazy(each) and not each.is_meta and each.numel():
            memory[each.device, each.data_ptr()].setdefault(id(each), name)
    if twice := [" and ".join(held.values()) for held in memory.values() if len(held) > 1]:
        rule = "are different Parameters in the same memory, which an optimizer would update twice"
        return Rejected("shared weights", f"{listed(twice)} {rule}: assign the same Parameter object to both")
    tied = [" = ".join(every) for every in names.values() if len(every) > 1]
    return Accepted("shared weights", f"tied: {listed(tied)}" if tied else "none")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Worker processes and pinned memory for the user's own data loader, where training waits for data."""

import io
import math
import pickle
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.measure.loading import Loading, measure_loader, measure_workers, why_not_measurable
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.gates import Numerics

_LEAST_SHARE = 0.1
"""Loading below this share of a step is left alone: worker processes cost memory and start-up."""

_HEADROOM = 1.25
"""Workers beyond the bare need, for handing batches over and for steps that are faster than the median."""

_LEAST_GAIN = 1.05
"""Or where measured workers would make a step faster by less than this."""

_SETTINGS = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")


class DataLoading:
    """``num_workers``, ``pin_memory``, ``persistent_workers`` and ``prefetch_factor`` of a torch ``DataLoader``.

    Order and content of batches stay. Random numbers that a dataset draws from Python, NumPy or torch come from other
    seeds, as with any number of workers in torch; a dataset with a generator of its own, of which each worker would
    repeat a copy, is declined. A loop over the loader that runs already is not changed; the next one is.
    """

    name = "data_loading"
    level = Level.CONSERVATIVE
    stage = Stage.INPUT
    turn = 80
    numerics = Numerics.SAME
    features: tuple[str, ...] = ()
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change, after loading was measured without and with the workers that it asks for."""
        loader, step = subject.loader, subject.step_seconds
        if reason := _why_not(loader):
            return [Rejected(self.name, reason)]
        if step is None:
            return [Rejected(self.name, "the time of a training step was not measured")]
        assert isinstance(loader, DataLoader)
        found = measure_loader(loader)
        figures = f"a batch loads in {_ms(found.seconds)}, a step takes {_ms(step)}"
        if reason := _why_no_workers(found, step, subject):
            return [Rejected(self.name, f"{figures}: {reason}")]
        cores = subject.profile.host.cores or 1
        # Workers that wait take no core away; torch warns of more workers than cores.
        limit = cores if found.busy < 0.5 else cores - 1
        setting = {
            "num_workers": min(limit, max(1, math.ceil(_HEADROOM * found.seconds / step))),
            "pin_memory": loader.pin_memory or subject.device.type == "cuda",
            # Workers that live on never see what a new epoch tells the dataset.
            "persistent_workers": not hasattr(loader.dataset, "set_epoch"),
            "prefetch_factor": 2,
        }
        seconds = measure_workers(loader, setting)
        figures += f", {setting['num_workers']} workers give one every {_ms(seconds)}"
        # Without workers a step waits for its batch; with them the slower of both sets the pace.
        predicted = (step + found.seconds) / max(step, seconds)
        if predicted < _LEAST_GAIN:
            return [Rejected(self.name, f"{figures}: {predicted:.2f}x is no gain worth worker processes")]
        return [Change(candidate=self.name, setting=setting, reason=figures, predicted=predicted)]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Write the settings into the loader object; the constructor's checks were made by :meth:`applies`."""
        if reason := _why_not(subject.loader):
            raise ConfigError("plan.data_loading", dict(setting), reason, "Make a new plan")
        own = vars(subject.loader)
        before = {name: own[name] for name in _SETTINGS}
        # DataLoader.__setattr__ refuses some of them only because a running loop would not see the change.
        own.update({name: setting[name] for name in _SETTINGS})
        return before

    def undo(self, subject: Subject, applied: dict[str, Any]) -> None:
        """Write the loader's own settings back; workers that it kept alive end."""
        vars(subject.loader).update(applied, _iterator=None)


CANDIDATE = DataLoading()


def _why_not(loader: Any) -> str | None:
    if loader is None:
        return "no data loader is known; pass it as loader="
    if type(loader) is not DataLoader:
        kind = f"{type(loader).__module__}.{type(loader).__name__}"
        return f"{kind} is not torch's own DataLoader: what its settings do is not known"
    if loader.num_workers > 0:
        return f"num_workers={loader.num_workers} was set by you"
    return why_not_measurable(loader)


def _why_no_workers(found: Loading, step: float, subject: Subject) -> str | None:
    if found.seconds <= _LEAST_SHARE * step:
        return "training does not wait for data"
    if (subject.profile.host.cores or 1) < 2:
        return "the only core is taken; worker processes would not run beside it"
    if found.changes is not None:
        return f"reading changes {found.changes!r} of the dataset, and each worker process would change its own copy"
    if reason := _why_not_shared(subject.loader):
        return reason
    if any(isinstance(leaf, Tensor) and leaf.device.type != "cpu" for leaf in tree_leaves(found.batch)):
        return "the dataset gives tensors on a device, which worker processes cannot hand over"
    if subject.device.type == "cpu" and found.busy > 0.5:
        return "loading computes, on the cores that train; worker processes would take them away"
    return None


class _Walk(pickle.Pickler):
    """Goes through an object as pickling does, past the content of what any two processes can share."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())

    def persistent_id(self, obj: Any) -> str | None:
        """Not None for what is not looked into."""
        shared = (Tensor, bytes, str, FunctionType, BuiltinFunctionType, MethodType, ModuleType, type)
        return "shared" if isinstance(obj, shared) or hasattr(obj, "__array_interface__") else None


def _why_not_shared(loader: Any) -> str | None:
    """Open files and connections: forked processes would move one common place in them."""
    try:
        _Walk().dump((loader.dataset, vars(loader.collate_fn) if hasattr(loader.collate_fn, "__dict__") else None))
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        return f"the dataset holds what processes cannot share ({error})"
    return None


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"

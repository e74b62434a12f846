"""Compiling a model as a whole, where it has no repeated blocks to compile one by one."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.compile_blocks import decide_blocks, is_compiled
from kpt_lightning.candidates.compiled_call import compiled_call
from kpt_lightning.candidates.cuda_graphs import Graphed
from kpt_lightning.candidates.inductor import Inductor
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.calls import ModuleCall, TensorSpec
from kpt_lightning.validation.gates import Numerics

# Host time of the three to six launches of one layer, forward and backward: 5 to 10 microseconds each, Python included.
# Above a few times that, the device is busy all the time and a graph of launches wins nothing.
_LAUNCH_BOUND_SECONDS = 200e-6

_PLAIN = "default"
_GRAPHS = "reduce-overhead"


class CompileModel:
    """``torch.compile`` of the outermost modules that a training step calls, in place; on CUDA also as CUDA graphs."""

    name = "compile_model"
    level = Level.CONSERVATIVE
    stage = Stage.COMPILE
    turn = 12
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ("compile",)
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change, or two on CUDA where launches are what takes the time."""
        if subject.config.compile.blocks is False:
            return [Rejected(self.name, "switched off by compile.blocks=False")]
        if reason := _why_not(subject.model):
            return [Rejected(self.name, reason)]
        if not subject.calls:
            return [Rejected(self.name, "no batch was run, so it is not known which modules a training step calls")]
        modules = dict(subject.model.named_modules())
        names = [name for name in _outermost(subject.calls) if _worth_it(modules[name])]
        if not names:
            return [Rejected(self.name, "the training step calls single layers only: there is nothing to fuse")]
        what = ", ".join(name or type(subject.model).__name__ for name in names)
        setting = {"modules": names, "mode": _PLAIN}
        found: list[Change | Rejected] = [
            Change(candidate=self.name, setting=setting, reason=f"{what} as a whole: no repeated blocks in it")
        ]
        if subject.device.type == "cuda":
            found.append(self._graphs(subject, names))
        return found

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> list[nn.Module]:
        """Compile the modules of a setting; tracing happens at their first call."""
        known = dict(subject.model.named_modules())
        if missing := [name for name in setting["modules"] if name not in known or is_compiled(known[name])]:
            rule = "are not in this model, or compiled already"
            raise ConfigError("plan.compile_model", missing, rule, "Make a new plan")
        chosen = [known[name] for name in setting["modules"]]
        for module in chosen:
            if setting["mode"] == _GRAPHS:
                module._compiled_call_impl = Graphed(module, subject.key)  # type: ignore[assignment,unused-ignore]
            else:
                compiled = compiled_call(module, Inductor(subject.key))
                module._compiled_call_impl = compiled  # type: ignore[assignment,unused-ignore]
        return chosen

    def undo(self, subject: Subject, applied: list[nn.Module]) -> None:
        """Call the modules' own code again."""
        for module in applied:
            compiled = vars(module).pop("_compiled_call_impl", None)
            if isinstance(compiled, Graphed):
                compiled.release()

    def _graphs(self, subject: Subject, names: list[str]) -> Change | Rejected:
        leaves = {name for name, module in subject.model.named_modules() if not any(module.children())}
        launches = sum(call.count for name, call in subject.calls.items() if name in leaves)
        share = None if subject.step_seconds is None else subject.step_seconds / max(launches, 1)
        if share is not None and share > _LAUNCH_BOUND_SECONDS:
            reason = f"{share * 1e6:.0f} microseconds a layer: the device is busy, and launches are not what takes time"
            return Rejected(self.name, f"CUDA graphs: {reason}")
        for name in names:
            if odd := _not_copied(subject.calls[name].output):
                return Rejected(self.name, f"CUDA graphs: {name!r} gives a {odd}, whose tensors cannot be copied out")
        setting = {"modules": names, "mode": _GRAPHS}
        reason = f"CUDA graphs: one launch instead of those of {launches} layers; outputs and gradients are copied out"
        return Change(candidate=self.name, setting=setting, reason=reason)


CANDIDATE = CompileModel()


def _why_not(model: nn.Module) -> str | None:
    if any(kind.__module__.startswith("transformers.") for each in model.modules() for kind in type(each).__mro__):
        return "a transformers model builds a dense mask while it is traced, and attention then loses its fast path"
    compiled = next((name for name, each in model.named_modules() if is_compiled(each)), None)
    if compiled is not None:
        return f"{compiled or type(model).__name__!r} is compiled already"
    if blocks := decide_blocks(model):
        return f"{len(blocks)} repeated blocks are compiled one by one instead"
    return None


def _outermost(calls: Mapping[str, ModuleCall]) -> list[str]:
    """Names of called modules none of whose parents was called."""
    if "" in calls:
        return [""]
    parts = {name: name.split(".") for name in calls}
    return [
        name for name, path in parts.items() if not any(".".join(path[:end]) in calls for end in range(1, len(path)))
    ]


def _worth_it(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _not_copied(output: Any) -> str | None:
    plain = (TensorSpec, bool, int, float, str, type(None))
    return next((type(leaf).__name__ for leaf in tree_leaves(output) if not isinstance(leaf, plain)), None)

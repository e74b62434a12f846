"""The "eager" attention of transformers, written out in matrix products, exchanged for torch's fused one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.replay import attention_setting
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.gates import Numerics

# What the property _attn_implementation of a transformers configuration reads.
_SLOT = "_attn_implementation_internal"


class SdpaAttention:
    """``config._attn_implementation`` from "eager" to "sdpa"."""

    name = "sdpa_attention"
    level = Level.CONSERVATIVE
    stage = Stage.ATTENTION
    turn = 29
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ()
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """All transformers models inside whose attention is eager and may be fused."""
        owners = dict(_owners("", subject.model))
        eager = {name: each for name, each in owners.items() if each.config._attn_implementation == "eager"}
        if not eager:
            setting = attention_setting(subject)
            found = "no transformers model inside" if setting is None else f"attention is {setting!r} already"
            return [Rejected(self.name, found)]
        reasons = {name: _why_not(each) for name, each in eager.items()}
        names = [name for name, reason in reasons.items() if reason is None]
        if not names:
            return [Rejected(self.name, "; ".join(sorted({reason for reason in reasons.values() if reason})))]
        kinds = ", ".join(sorted({type(eager[name]).__name__ for name in names}))
        return [Change(candidate=self.name, setting={"modules": names}, reason=f"{kinds}: attention in one kernel")]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> ExitStack:
        """Set it on each named model and what lies inside it.

        Raises:
            ConfigError: A name is no transformers model here, or the model refused.
        """
        owners = dict(_owners("", subject.model))
        with ExitStack() as undo:
            for name in setting["modules"]:
                if name not in owners:
                    raise ConfigError("plan.sdpa_attention", name, "is no transformers model here", "Make a new plan")
                owner = owners[name]
                for config in _configs(owner):
                    undo.callback(_restore, config, vars(config).get(_SLOT))
                owner.set_attn_implementation("sdpa")
                if owner.config._attn_implementation != "sdpa":
                    rule = f"{type(owner).__name__} did not take 'sdpa'"
                    raise ConfigError("plan.sdpa_attention", name, rule, "Make a new plan")
            return undo.pop_all()

    def undo(self, subject: Subject, applied: ExitStack) -> None:
        """Each configuration as it was."""
        applied.close()


CANDIDATE = SdpaAttention()


def _owners(prefix: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost modules that are transformers models; told by name, for this layer imports no transformers."""
    kinds = type(module).__mro__
    if any(kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.") for kind in kinds):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _owners(f"{prefix}.{name}" if prefix else name, child)


def _configs(owner: nn.Module) -> list[Any]:
    """Each configuration object inside, once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [each.config for each in owner.modules() if hasattr(getattr(each, "config", None), _SLOT)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
            waiting += [part for part in parts if hasattr(part, _SLOT)]
    return list(found.values())


def _restore(config: Any, value: Any) -> None:
    vars(config)[_SLOT] = value


def _why_not(owner: Any) -> str | None:
    kind = type(owner).__name__
    if getattr(owner.config, "attn_logit_softcapping", None):
        return f"{kind} caps its attention scores (config.attn_logit_softcapping), which torch's kernels do not"
    if not getattr(owner, "_supports_sdpa", False):
        return f"transformers has no fused attention for {kind}"
    if getattr(owner.config, "output_attentions", False):
        return f"{kind} returns its attention weights (config.output_attentions), which a fused kernel never has"
    return None

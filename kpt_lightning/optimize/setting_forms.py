"""The form of each candidate's setting in a plan, held against a file that somebody may have written by hand."""

import functools
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.candidates.gated_rule import GatedRule
from kpt_lightning.candidates.norm_rule import NormRule
from kpt_lightning.errors import ConfigError


class _Norms(TypedDict):
    rule: NormRule
    modules: list[str]


class _Gated(TypedDict):
    rule: GatedRule
    modules: list[str]


FORMS: dict[str, dict[str, Any]] = {
    "activation_checkpointing": {"blocks": list[str]},
    "attention_backend": {"backend": str},
    "causal_attention": {"wholes": list[str], "blocks": list[str]},
    "channels_last": {"modules": list[str]},
    "compile_blocks": {"blocks": list[str]},
    "compile_model": {"modules": list[str], "mode": str},
    "data_loading": {"num_workers": int, "pin_memory": bool, "persistent_workers": bool, "prefetch_factor": int},
    "float8": {"recipe": str, "layers": list[str]},
    "float8_mlp": {"groups": list[_Gated]},
    "float8_siblings": {"groups": list[list[str]]},
    "fused_mlp": {"groups": list[_Gated]},
    "fused_norm": {"backend": str, "groups": list[_Norms]},
    "float8_cross_entropy": {"head": str, "grad_weight": str},
    "linear_cross_entropy": {"head": str, "chunk_rows": int | None},
    "low_bit_optimizer": {"storage": str},
    "merged_linear": {"groups": list[list[str]]},
    "sdpa_attention": {"modules": list[str]},
    "shape_bucketing": {"multiple": int, "token": int, "mask": int, "longest": int | None},
}
"""Candidate to the entries that its setting must have; those that are not named need none."""


def check_setting(change: Change) -> None:
    """Look at a change that was made elsewhere.

    Raises:
        ConfigError: Its setting lacks an entry, or has one of another kind.
    """
    field = f"plan.{change.candidate}"
    if not isinstance(change.setting, Mapping):
        raise ConfigError(field, change.setting, "is no setting", "Make a new plan")
    for name in FORMS.get(change.candidate, {}):
        if name not in change.setting:
            raise ConfigError(field, dict(change.setting), f"lacks {name!r}", "Make a new plan")
        try:
            _adapter(change.candidate, name).validate_python(change.setting[name])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            rule = f"is not of the form that is asked for: {place + ': ' if place else ''}{first['msg']}"
            raise ConfigError(f"{field}.{name}", change.setting[name], rule, "Make a new plan") from error


@functools.cache
def _adapter(candidate: str, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(FORMS[candidate][name])

"""Taking up a plan that was made before: from a file, a cache or a search."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kpt_lightning.candidates import registry
from kpt_lightning.candidates.candidate import Change
from kpt_lightning.decision import Accepted
from kpt_lightning.errors import ConfigError, UnsupportedHardwareError
from kpt_lightning.hardware import HardwareProfile
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.setting_forms import check_setting
from kpt_lightning.precision.convert import float8_available


def load_plan(source: Plan | dict[str, Any] | str | Path) -> Plan:
    """A plan, what its ``to_dict`` gave, or the one in a JSON file.

    Raises:
        ConfigError: The file cannot be read, or holds no plan of this version.
    """
    if isinstance(source, Plan):
        return source
    if isinstance(source, dict):
        return Plan.from_dict(source)
    if not isinstance(source, str | Path):
        raise ConfigError("plan", type(source).__name__, "is no plan", "Give a Plan, its dict, or the path of its JSON")
    try:
        data = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("plan", str(source), f"cannot be read: {error}", "Check the path") from error
    if not isinstance(data, dict):
        raise ConfigError("plan", str(source), "holds no plan", "Write one with plan.to_dict()")
    return Plan.from_dict(data)


def adopted(plan: Plan, profile: HardwareProfile, *, parallel: Accepted | None, given_precision: str | None) -> Plan:
    """The plan for another run: nothing is proved yet.

    Raises:
        ConfigError: It names a candidate that is not known here, lacks part of a setting, or contradicts the trainer's
            own precision.
        UnsupportedHardwareError: It needs what this machine does not have.
    """
    # FP8 layers run under a trainer's bf16 autocast as well.
    fits = (plan.precision, {"fp8": "bf16-mixed", "fp8-true": "bf16-true"}.get(plan.precision, plan.precision))
    if given_precision is not None and given_precision not in fits:
        raise ConfigError(
            "plan", f"precision {plan.precision}", f"contradicts the trainer's own precision {given_precision!r}",
            "Remove one of the two",
        )  # fmt: skip
    for number, change in enumerate(plan.changes):
        if change.candidate in {before.candidate for before in plan.changes[:number]}:
            raise ConfigError("plan.changes", change.candidate, "is there twice", "Make a new plan")
        _check(change, plan, profile)
    layout = plan.parallel if parallel is None else parallel.subject.removeprefix("parallel ")
    return replace(plan, proofs=[], parallel=layout, device=profile.primary.name)


def _check(change: Change, plan: Plan, profile: HardwareProfile) -> None:
    candidate = registry.candidate(change.candidate)
    check_setting(change)
    verdicts = [profile.supports(feature) for feature in candidate.features]
    verdicts += [package.available() for package in candidate.packages]
    if change.candidate == "float8":
        section = plan.config.float8.model_copy(update={"recipe": change.setting["recipe"]})
        verdicts.append(float8_available(section, profile))
    for verdict in verdicts:
        if not verdict:
            raise UnsupportedHardwareError(
                f"the plan asks for {change.candidate}, and {verdict.reason}. Make a new plan on this machine"
            )

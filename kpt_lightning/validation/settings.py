"""Which settings can take effect on a machine, and which it would ignore or refuse."""

from collections.abc import Callable

from pydantic import BaseModel

from kpt_lightning.config import BF16_WEIGHTS, FP8_PRECISIONS, CompileConfig, Float8Config, KptConfig
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.hardware import HardwareProfile
from kpt_lightning.validation.findings import Findings

Check = Callable[[str, KptConfig, HardwareProfile], Decision]


def validate_config(config: KptConfig, profile: HardwareProfile) -> Findings:
    """One decision for each setting that was given; one left at its default follows the hardware by itself.

    Args:
        config: The user's settings.
        profile: The machine on which they are to take effect.

    Returns:
        Subjects are dotted names of settings, such as "compile.blocks".
    """
    return Findings(tuple(_CHECKS.get(name, _taken)(name, config, profile) for name in _given(config)))


def _given(config: KptConfig) -> list[str]:
    """Dotted names of the settings that were given, in the order of their definition."""
    names: list[str] = []
    for name in KptConfig.model_fields:
        if name not in config.model_fields_set:
            continue
        section = getattr(config, name)
        if isinstance(section, BaseModel):
            names += [f"{name}.{key}" for key in type(section).model_fields if key in section.model_fields_set]
        else:
            names.append(name)
    return names


def _value(name: str, config: KptConfig) -> object:
    found: object = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _taken(name: str, config: KptConfig, profile: HardwareProfile) -> Decision:
    return Accepted(name, f"{_value(name, config)!s}, on any machine")


def _precision(name: str, config: KptConfig, profile: HardwareProfile) -> Decision:
    if config.precision in FP8_PRECISIONS:
        verdict = _float8_unit(config, profile)
        step = "set precision='auto' to use what is there, or float8.emulate=True for the numbers without the speed"
        return Accepted(name, verdict.reason) if verdict else Rejected(name, f"{verdict.reason}: {step}")
    if config.precision in (*BF16_WEIGHTS, "bf16-mixed") and not (unit := profile.supports("bf16")):
        return Accepted(name, f"takes effect, and is slow here: {unit.reason}")
    return _taken(name, config, profile)


def _float8(name: str, config: KptConfig, profile: HardwareProfile) -> Decision:
    verdict = _float8_unit(config, profile)
    if verdict:
        return Accepted(name, f"{_value(name, config)!s}; {verdict.reason}")
    if config.precision in FP8_PRECISIONS:
        return Rejected(name, f"FP8 cannot run here: {verdict.reason}")
    return Rejected(name, f"is ignored, for precision='auto' takes no FP8 here: {verdict.reason}; remove it")


def _float8_unit(config: KptConfig, profile: HardwareProfile) -> Decision:
    if config.float8.emulate:
        return Accepted("fp8", "emulated in fp32 arithmetic on any machine")
    return profile.supports("fp8_tensorwise" if config.float8.recipe == "tensorwise" else "fp8_rowwise")


def _compile(name: str, config: KptConfig, profile: HardwareProfile) -> Decision:
    asked, possible = _value(name, config), profile.supports("compile")
    if asked is True:
        return Accepted(name, possible.reason) if possible else Rejected(name, f"{possible.reason}; or remove {name}")
    if asked is False:
        return Accepted(name, "switched off")
    return Accepted(name, "auto: decided for each run")


def _parallel(name: str, config: KptConfig, profile: HardwareProfile) -> Decision:
    count, kind = len(profile.devices), profile.kind
    if config.parallel == "xla" and kind != "xla":
        return Rejected(name, f"'xla' is for TPUs, and this machine offers {profile.primary.title}: use 'auto'")
    if config.parallel == "single" and count > 1:
        return Accepted(name, f"single: {count - 1} of {count} devices stay idle")
    if config.parallel in ("ddp", "fsdp2") and count == 1:
        return Accepted(name, f"{config.parallel}: one device here, so it gains only with more nodes or processes")
    return Accepted(name, f"{config.parallel}, on {count} device{'s' if count > 1 else ''}")


def _verify(name: str, config: KptConfig, profile: HardwareProfile) -> Decision:
    if config.verify == "kernels" and profile.kind != "cuda":
        return Rejected(
            name, f"'kernels' profiles a CUDA step, and there is none on {profile.primary.title}: remove it"
        )
    return _taken(name, config, profile)


_CHECKS: dict[str, Check] = {
    "precision": _precision,
    "parallel": _parallel,
    "verify": _verify,
    **{f"float8.{name}": _float8 for name in Float8Config.model_fields},
    **{f"compile.{name}": _compile for name in CompileConfig.model_fields},
}

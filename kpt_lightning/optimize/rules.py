"""Making a plan by rules: what is asked for wins, "auto" follows the hardware. Nothing is measured here."""

from dataclasses import replace

from torch import nn

from kpt_lightning.candidates.candidate import Change
from kpt_lightning.candidates.compile_blocks import decide_blocks, is_compiled
from kpt_lightning.candidates.compile_loss import decide_loss
from kpt_lightning.candidates.float8 import with_head
from kpt_lightning.candidates.key_value_cache import decide_cache
from kpt_lightning.config import BF16_WEIGHTS, FP8_PRECISIONS, KptConfig, Level
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import ConfigError, UnsupportedHardwareError
from kpt_lightning.hardware import HardwareProfile
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.precision.convert import decide_layers, float8_available

ASKED = "asked for"


def on_device(profile: HardwareProfile, device_type: str) -> HardwareProfile:
    """The profile of the devices that this run uses: those of ``device_type``, or the host."""
    devices = tuple(device for device in profile.devices if device.kind == device_type)
    return replace(profile, devices=devices or (profile.host,))


def check_explicit(config: KptConfig, profile: HardwareProfile) -> None:
    """Refuse at once what this machine cannot do.

    Raises:
        UnsupportedHardwareError: FP8 was asked for, is not emulated, and there is no unit for it.
    """
    if config.precision not in FP8_PRECISIONS:
        return
    verdict = float8_available(config.float8, profile)
    if not verdict:
        raise UnsupportedHardwareError(
            f"precision={config.precision!r} was asked for, and {verdict.reason}. Set precision='auto' to use what is "
            "there, or float8.emulate=True for the same numbers in fp32 arithmetic"
        )


def make_plan(
    model: nn.Module,
    config: KptConfig,
    profile: HardwareProfile,
    *,
    parallel: Accepted | None,
    given_precision: str | None = None,
    compiled_by: str | None = None,
) -> Plan:
    """Decide everything for one model.

    Args:
        model: On any device; not changed.
        config: The user's settings.
        profile: Of the devices that this run uses; see :func:`on_device`.
        parallel: The decision, such as "parallel ddp"; None beside a strategy of Lightning's.
        given_precision: The trainer's own precision plugin stays in charge; its name.
        compiled_by: Who compiles the whole model afterwards, so that nothing in it is compiled now.

    Raises:
        UnsupportedHardwareError: As :func:`check_explicit`, or a compilation that was asked for is impossible.
        ConfigError: The backend of FP8 layers does not go with the way of parallel training.
    """
    check_explicit(config, profile)
    if config.float8.backend != "native" and parallel is not None and parallel.subject == "parallel fsdp2":
        rule = "keeps the Parameters of the layers, which fsdp2 exchanges"
        raise ConfigError("float8.backend", config.float8.backend, rule, "Remove it, or train by ddp")
    name = "the trainer's strategy" if parallel is None else parallel.subject.removeprefix("parallel ")
    plan = Plan(config=config, device=profile.primary.name, precision="32", parallel=name)
    if parallel is not None:
        plan.choices.append(parallel)
    plan.blocks = decide_blocks(model)
    others = None if compiled_by is None else f"{compiled_by} compiles the whole model"
    blocks = Rejected("compile blocks", others) if others else _compile_blocks(plan, model, profile)
    if not blocks:
        plan.blocks = _unused(plan.blocks, "blocks are not compiled")
    _choose_precision(plan, model, profile, bool(blocks or others), given_precision)
    plan.choices.append(blocks)
    plan.choices.append(Rejected("compile loss", others) if others else _compile_loss(model, config, profile))
    if blocks:
        plan.choices.append(decide_cache(model))
    plan.changes = _changes(plan)
    return plan


def _changes(plan: Plan) -> list[Change]:
    """What the decisions come to."""
    layers = [layer.subject for layer in plan.layers if layer]
    blocks = [block.subject for block in plan.blocks if block]
    changes: list[Change] = []
    if plan.precision in FP8_PRECISIONS and layers:
        float8 = plan.config.float8
        other = {} if float8.backend == "native" else {"backend": float8.backend}
        setting = {"recipe": float8.recipe, "layers": layers, **other}
        changes.append(Change(candidate="float8", setting=setting, reason="by rules"))
    if plan.accepts("compile blocks"):
        changes.append(Change(candidate="compile_blocks", setting={"blocks": blocks}, reason="by rules"))
    if plan.accepts("compile loss"):
        changes.append(Change(candidate="compile_loss", reason="by rules"))
    return changes


def _choose_precision(
    plan: Plan, model: nn.Module, profile: HardwareProfile, compiled: bool, given_precision: str | None
) -> None:
    if given_precision is not None:
        plan.precision = given_precision
        plan.choices.append(Accepted(f"precision {given_precision}", "the trainer's own setting"))
        return
    asked = plan.config.precision
    if asked in ("auto", *FP8_PRECISIONS):
        plan.layers = decide_layers(model, with_head(plan.config))
        verdict = _float8(plan, profile, compiled)
        plan.choices.append(verdict)
        if not verdict:
            plan.layers = _unused(plan.layers, "FP8 is not used")
        used = "fp8" if asked == "auto" else asked
        plan.precision = used if verdict else _without_float8(plan, profile)
    else:
        plan.precision = asked
    reason = ASKED if asked == plan.precision else "chosen for this hardware"
    if asked in (*BF16_WEIGHTS, "bf16-mixed") and not (unit := profile.supports("bf16")):
        reason += f", though it is slow here: {unit.reason}"
    masters = {
        "fp8": "; fp32 master weights, bf16 autocast", "fp8-true": "; bf16 weights",
        "bf16-mixed": "; fp32 master weights",
    }  # fmt: skip
    plan.choices.append(Accepted(f"precision {plan.precision}", reason + masters.get(plan.precision, "")))


def _unused(decisions: list[Decision], reason: str) -> list[Decision]:
    """What was accepted by itself, rejected with the whole."""
    return [Rejected(each.subject, f"{each.reason}: {reason}") if each else each for each in decisions]


def _float8(plan: Plan, profile: HardwareProfile, compiled: bool) -> Decision:
    """Whether FP8 is used at all."""
    verdict = float8_available(plan.config.float8, profile)
    accepted = sum(1 for layer in plan.layers if layer)
    if plan.config.precision in FP8_PRECISIONS:
        if not accepted:
            reasons = "; ".join(sorted({layer.reason for layer in plan.layers})[:3]) or "the model has no linear layer"
            raise UnsupportedHardwareError(
                f"precision={plan.config.precision!r} was asked for, and none of {len(plan.layers)} linear layers can "
                f"run in it: {reasons}. Widen float8.include, set float8.only_where_it_pays=False, or set "
                "precision='auto'"
            )
        return verdict
    if plan.config.level is Level.CONSERVATIVE:
        return Rejected("fp8", "level 'conservative' keeps the numbers")
    if not verdict:
        return verdict
    if not accepted:
        return Rejected("fp8", f"none of {len(plan.layers)} linear layers gains from it")
    if not compiled:
        # https://github.com/pytorch/ao/tree/main/torchao/prototype/float8nocompile: casts in eager mode cost more.
        return Rejected("fp8", "without compiled blocks the casts cost more than FP8 wins; precision='fp8' insists")
    return verdict


def _without_float8(plan: Plan, profile: HardwareProfile) -> str:
    if profile.kind == "cpu":
        fast = [name for name in ("amx_bf16",) if name in profile.primary.isa]
        verdict: Decision = (
            Accepted("bf16-mixed", f"{profile.primary.name} has {fast[0]}")
            if fast
            else Rejected("bf16-mixed", f"{profile.primary.name} has no AMX unit; autocast casts would not pay back")
        )
    else:
        verdict = replace(profile.supports("bf16"), subject="bf16-mixed")
    plan.choices.append(verdict)
    return "bf16-mixed" if verdict else "32"


def _compile_blocks(plan: Plan, model: nn.Module, profile: HardwareProfile) -> Decision:
    asked = plan.config.compile.blocks
    found = sum(1 for block in plan.blocks if block)
    verdict = _compile("compile blocks", asked, profile)
    if not verdict:
        return verdict
    if not found:
        if any(is_compiled(module) for module in model.modules()):
            return Rejected("compile blocks", "the user compiled already what there is")
        return _refused(asked, Rejected("compile blocks", "the model has no repeated blocks"))
    return Accepted("compile blocks", f"{found} blocks, in place; {verdict.reason}")


def _compile_loss(model: nn.Module, config: KptConfig, profile: HardwareProfile) -> Decision:
    verdict = _compile("compile loss", config.compile.loss, profile)
    return _refused(config.compile.loss, decide_loss(model)) if verdict else verdict


def _refused(asked: bool | str, verdict: Decision) -> Decision:
    """The verdict; a rejection of what was asked for raises."""
    if asked is True and not verdict:
        raise UnsupportedHardwareError(
            f"compile.{verdict.subject.split()[1]}=True was asked for, and {verdict.reason}. Set it to 'auto' or False"
        )
    return verdict


def _compile(subject: str, asked: bool | str, profile: HardwareProfile) -> Decision:
    if asked is False:
        return Rejected(subject, "switched off")
    possible = profile.supports("compile")
    if asked is True:
        if not possible:
            _refused(asked, replace(possible, subject=subject))
        return Accepted(subject, ASKED)
    if profile.kind == "cpu":
        return Rejected(subject, f"on a CPU it is done when asked for: compile.{subject.split()[1]}=True")
    return replace(possible, subject=subject)

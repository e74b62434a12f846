"""A plan by rules for one model, within what Accelerate has decided."""

from torch import nn

from kpt_lightning.config import FP8_PRECISIONS, KptConfig, Level
from kpt_lightning.decision import Accepted
from kpt_lightning.hardware import detect
from kpt_lightning.huggingface.surroundings import Surroundings
from kpt_lightning.optimize.plan import Plan
from kpt_lightning.optimize.rules import make_plan, on_device


def plan_for(model: nn.Module, config: KptConfig, around: Surroundings) -> Plan:
    """Decide everything for one model.

    With ``mixed_precision: no`` the config chooses the precision; with ``bf16`` it may only add FP8; ``fp16`` stays.

    Args:
        model: On any device; not changed.
        config: The user's settings, checked against ``around``.
        around: What Accelerate has decided.

    Raises:
        UnsupportedHardwareError: What was asked for by name is not possible here.
        ConfigError: The backend of FP8 layers does not go with the way of parallel training.
    """
    profile = on_device(detect(), around.device.type)
    parallel = Accepted(f"parallel {around.parallel}", "Accelerate's own")
    compiled_by = "Accelerate" if around.compiles else None

    def made(given: str | None) -> Plan:
        return make_plan(
            model, config, profile, parallel=parallel, given_precision=given, compiled_by=compiled_by
        )  # fmt: skip

    asked = config.precision != "auto"
    # Autocast of ours cannot stand around a model that Accelerate compiles.
    bound = around.precision == "16-mixed" or (around.compiles and around.precision == "32")
    if bound or (not asked and config.level is Level.CONSERVATIVE):
        return made(around.precision)
    plan = made(None)
    if around.precision == "bf16-mixed" and not asked and plan.precision not in FP8_PRECISIONS:
        return made(around.precision)
    return plan

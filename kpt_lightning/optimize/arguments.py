"""What a search is given, checked before anything runs."""

import torch
from torch import nn
from torch.optim import Optimizer

from kpt_lightning.errors import ConfigError

GOALS = ("speed", "memory")


def check_search(max_seconds: object, goal: object = "speed") -> None:
    """Raise ConfigError where the budget or the goal is none."""
    if not isinstance(max_seconds, int | float) or isinstance(max_seconds, bool) or not max_seconds > 0:
        raise ConfigError("max_seconds", max_seconds, "must be a number of seconds above 0", "Give about 120")
    if goal not in GOALS:
        raise ConfigError("goal", goal, f"must be one of {', '.join(GOALS)}", "Leave it out for speed")


def check_loop(model: object, optimizer: object) -> None:
    """Raise ConfigError where a plain loop gives something else than a model that trains and its optimizer."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "model", type(model).__name__, "is no torch.nn.Module", "Give the module that the loop trains"
        )
    if isinstance(model, torch.jit.ScriptModule):
        rule = "is a ScriptModule, whose code cannot be replaced or compiled"
        raise ConfigError("model", type(model).__name__, rule, "Give the module that it was scripted from")
    if not torch.is_grad_enabled():
        rule = "are switched off here, so that no backward pass can be tried"
        raise ConfigError("gradients", False, rule, "Call it outside of torch.no_grad and torch.inference_mode")
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        found = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        rule = "is no torch.optim.Optimizer object"
        raise ConfigError("optimizer", found, rule, "Give the one that the loop steps, or leave it out")
    own = {id(each) for each in model.parameters()}
    if not any(id(each) in own for group in optimizer.param_groups for each in group["params"]):
        rule = "has no parameter of this model"
        raise ConfigError("optimizer", type(optimizer).__name__, rule, "Give the one made for this model's parameters")

"""``kpt optimize``: try optimizations on a model of the user's, print the plan, and write it for other runs."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kpt_lightning.errors import ConfigError


def optimize(
    target: Annotated[
        str, typer.Argument(metavar="FILE:FUNCTION", help="A function that returns a model and a batch.")
    ],
    level: Annotated[
        str | None, typer.Option("--level", help="What may change in the numbers: conservative, balanced, aggressive.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="No trial starts later than that.  [default: 120]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the plan as JSON, for plan= of another run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON instead of a table.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Try again: neither read nor keep a stored plan.")] = False,
    goal: Annotated[
        Literal["speed", "memory"], typer.Option("--goal", help="memory also tries what costs speed.")
    ] = "speed",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="More settings, from a YAML file.")
    ] = None,
) -> None:
    """Try each optimization on the model and the batch that FUNCTION returns, and keep those that measurably help.

    FUNCTION takes no argument and returns (model, batch), (model, batch, loss_fn), or a dict of model, batch, loss_fn,
    optimizer and loader, on the device where training will run. Nothing is trained, and no weight changes.
    """
    from kpt_lightning.cli.target import load_target
    from kpt_lightning.config import KptConfig

    _check_out(out)
    if max_seconds is not None and not max_seconds > 0:
        raise ConfigError("--max-seconds", max_seconds, "must be above 0", "Give seconds, or leave it out")
    settings = KptConfig.build(config, level=level)
    given = load_target(target)
    if given.batch is None:
        rule = "gives no batch to measure on"
        raise ConfigError("target", target, rule, "Return (model, batch), such as with next(iter(loader))")
    from kpt_lightning import auto_optimize, plan_of

    budget: dict[str, Any] = {} if max_seconds is None else {"max_seconds": max_seconds}
    model = auto_optimize(
        given.model, given.batch, loss_fn=given.loss_fn, optimizer=given.optimizer, loader=given.loader,
        config=settings, cache=not fresh, goal=goal, **budget,
    )  # fmt: skip
    plan = plan_of(model)
    if plan is None:
        raise RuntimeError("auto_optimize left no plan")
    text = json.dumps(plan.to_dict(), indent=2)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
        return
    from rich.console import Console

    Console(highlight=False).print(plan.render())


def _check_out(out: Path | None) -> None:
    """Before minutes of trials, not after them."""
    if out is None:
        return
    if out.is_dir() or not out.resolve().parent.is_dir():
        rule = "is a directory" if out.is_dir() else "lies in a directory that is not there"
        raise ConfigError("--out", str(out), rule, "Give the path of a file in a directory that exists")

"""``kpt finetune``: run a recipe, with the held-out figures before and after, and write a Hugging Face folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpt_lightning.errors import ConfigError

if TYPE_CHECKING:
    from kpt_lightning.recipes.config import FineTuneConfig


def finetune(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="See --list.", show_default=False)] = "",
    model: Annotated[
        str | None, typer.Option("--model", help="A name that the recipe knows, a Hugging Face folder or a hub name.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="A .txt, .jsonl or .parquet file, a folder, hub:NAME, or a known name.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Rows in one forward pass.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Peak rate of AdamW.")] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="FOLDER", help="Write the model there.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of --output.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model instead of the adapters.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, such as lora.rank=16. Repeatable."),
    ] = None,
    accelerate: Annotated[
        bool, typer.Option("--accelerate/--lightning", help="What trains: an Accelerate loop or Lightning's Trainer.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Without the optimizations of kpt, to compare.")] = False,
    kpt_config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings of kpt, from a YAML file.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Print the recipes.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every setting, train nothing.")] = False,
) -> None:
    """Fine-tune a model: held-out figures before and after, a report, and a folder that transformers loads."""
    if list_all:
        _print_recipes()
        return
    given = {
        "model": model, "data": None if data is None else {"source": data}, "steps": steps, "batch_size": batch_size,
        "learning_rate": learning_rate, "output": output, "merge": merge or None,
    }  # fmt: skip
    from kpt_lightning.recipes.registry import default_config

    config = default_config(recipe, **_together(given, settings or []))
    if overwrite and config.output is None:
        raise ConfigError("--overwrite", overwrite, "nothing is written without --output", "Give --output FOLDER")
    if plain and kpt_config is not None:
        raise ConfigError("--config", str(kpt_config), "would be ignored beside --plain", "Remove one of them")
    if print_config:
        typer.echo(config.to_yaml(), nl=False)
        return
    _run(config, accelerate=accelerate, plain=plain, kpt_config=kpt_config, overwrite=overwrite)


def _run(config: "FineTuneConfig", *, accelerate: bool, plain: bool, kpt_config: Path | None, overwrite: bool) -> None:
    if accelerate:
        from kpt_lightning.recipes import accelerate_run

        maker = accelerate_run.make_accelerator
        accelerate_run.fine_tune(
            config, accelerator=maker(config, kpt=not plain, settings=kpt_config), overwrite=overwrite
        )
        return
    from kpt_lightning.recipes import lightning_run
    from kpt_lightning.strategies.strategy import KptStrategy

    lightning_run.fine_tune(config, strategy="auto" if plain else KptStrategy(kpt_config), overwrite=overwrite)


def _together(given: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The options by name with those of --set.

    Raises:
        ConfigError: One of --set has no equals sign, or stands beside the option of the same setting.
    """
    from kpt_lightning.recipes.config import merged

    changes = {name: value for name, value in given.items() if value is not None}
    seen = {"data.source" if name == "data" else name for name in changes}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not (name and equals):
            raise ConfigError("--set", setting, "is no NAME=VALUE", "Write it as in --set lora.rank=16")
        if name in seen:
            raise ConfigError("--set", setting, f"{name} is given twice", "Remove one of them")
        seen.add(name)
        nested: Any = _value(text)
        for part in reversed(name.split(".")):
            nested = {part: nested}
        changes = merged(changes, nested)
    return changes


def _value(text: str) -> Any:
    """A number, true, false, null or a list as in JSON; anything else is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _print_recipes() -> None:
    from rich.console import Console

    from kpt_lightning.cli.tables import new_table
    from kpt_lightning.recipes.registry import RECIPES

    table = new_table("Recipes", "name", "what it does", "model", "data")
    for name, recipe in RECIPES.items():
        config = recipe.config()
        table.add_row(name, recipe.text, config.model, config.data.source)
    Console(highlight=False).print(table)

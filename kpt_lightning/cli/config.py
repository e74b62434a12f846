"""``kpt config``: the settings that there are, their defaults, and whether a file of them is right."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kpt_lightning.errors import ConfigError


def config(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a config file.")] = False,
    default: Annotated[bool, typer.Option("--default", help="Print every setting with its default, as YAML.")] = False,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="FILE", help="Read a YAML file and say what it sets.")
    ] = None,
) -> None:
    """Show the schema or the defaults of a config file, or check one. One of the three options."""
    from kpt_lightning.config import KptConfig, json_schema

    if schema + default + (check is not None) != 1:
        given = [name for name, wanted in (("--schema", schema), ("--default", default), ("--check", check)) if wanted]
        rule = "takes exactly one of --schema, --default and --check FILE"
        raise ConfigError("kpt config", " ".join(given), rule, "Run 'kpt config --help'")
    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
    elif default:
        typer.echo("# Keep the lines that you change: a line that is there counts as asked for.")
        typer.echo(KptConfig().to_yaml(unset=True), nl=False)
    elif check is not None:
        settings = KptConfig.from_yaml(check).to_yaml()
        typer.echo(f"{check}: right")
        typer.echo("it sets nothing" if settings == "{}\n" else settings, nl=settings == "{}\n")

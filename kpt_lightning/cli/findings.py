"""The checks behind ``kpt doctor --model`` and ``--config``, and how their findings are shown."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kpt_lightning.cli.tables import new_table, plain

if TYPE_CHECKING:
    from kpt_lightning.hardware.profile import HardwareProfile
    from kpt_lightning.validation.findings import Findings


def check_model(name: str, reference: str | None) -> "Findings":
    """Validate the model of a target, beside that of another where one is named.

    Raises:
        ConfigError: A target cannot be loaded.
    """
    from kpt_lightning.cli.target import load_target
    from kpt_lightning.validation.model import validate_model

    target = load_target(name)
    other = None if reference is None else load_target(reference).model
    return validate_model(target.model, target.batch, loss_fn=target.loss_fn, reference=other)


def check_config(path: Path, machine: "HardwareProfile") -> "Findings":
    """Which settings of a YAML file take effect on a machine.

    Raises:
        ConfigError: The file cannot be read or breaks a rule.
    """
    from kpt_lightning.config import KptConfig
    from kpt_lightning.validation.settings import validate_config

    return validate_config(KptConfig.from_yaml(path), machine)


def show(found: Mapping[str, "Findings"], as_json: bool) -> None:
    """Print findings, by what was checked.

    Raises:
        typer.Exit: With status 1, where there is a fault.
    """
    if as_json:
        typer.echo(json.dumps({what: each.to_dict() for what, each in found.items()}, indent=2))
    else:
        _print(found)
    if not all(each.ok for each in found.values()):
        raise typer.Exit(1)


def _print(found: Mapping[str, "Findings"]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for what, findings in found.items():
        table = new_table(f"Findings: {what}", "Check" if what == "model" else "Setting", "Verdict", "Reason")
        for each in findings:
            table.add_row(each.subject, "[green]ok[/]" if each else "[red]fault[/]", plain(each.reason))
        console.print(table)
        count = len(findings.faults)
        console.print(f"{count} fault{'' if count == 1 else 's'} in {len(findings)} checks\n")

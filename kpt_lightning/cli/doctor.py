"""``kpt doctor``: what this machine is, what it can do and why, and which optional packages are missing."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpt_lightning.cli.tables import new_table, plain

if TYPE_CHECKING:
    from rich.table import Table

    from kpt_lightning.hardware.device import DeviceProfile
    from kpt_lightning.hardware.profile import HardwareProfile


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print data instead of tables.")] = False,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", exists=True, dir_okay=False, help="Decide on a stored profile, not on this machine."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="FILE:FUNCTION", help="Check the model, and the batch, that a function returns."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="FILE:FUNCTION", help="Compare the model with the one of this function."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Say which settings of a file take effect here.")
    ] = None,
) -> None:
    """Show devices, features with reasons, optional packages and versions; or check a model or a config file.

    Exit status 1 where a check of --model or --config finds a fault.
    """
    from kpt_lightning.cli.findings import check_config, check_model, show
    from kpt_lightning.errors import ConfigError
    from kpt_lightning.hardware import HardwareProfile, detect

    if reference is not None and model is None:
        raise ConfigError("--reference", reference, "is compared with a model", "Add --model FILE:FUNCTION")
    if model is not None or config is not None:
        found = {} if model is None else {"model": check_model(model, reference)}
        if config is not None:
            found["config"] = check_config(config, detect() if profile is None else HardwareProfile.load(profile))
        show(found, as_json)
        return
    machine = detect() if profile is None else HardwareProfile.load(profile)
    if as_json:
        typer.echo(json.dumps(report(machine), indent=2))
    else:
        _print(machine)


def report(machine: "HardwareProfile") -> dict[str, Any]:
    """All that ``kpt doctor`` shows, as JSON-like data."""
    from kpt_lightning import __version__, optional
    from kpt_lightning.decision import to_dict
    from kpt_lightning.hardware import features, peaks

    rates = {dtype: machine.peak_flops(dtype) for dtype in peaks.DTYPES}
    return {
        "kpt_lightning": __version__,
        "profile": machine.to_dict(),
        "kind": machine.kind,
        "primary": machine.primary.name,
        "is_mixed": machine.is_mixed,
        "features": [to_dict(machine.supports(name)) for name in features.NAMES],
        "peak_flops": {key: {"flops": rate.flops, "source": rate.source} for key, rate in rates.items() if rate},
        "optional": [
            to_dict(package.available()) | {"purpose": package.purpose, "install": package.pip_line}
            for package in optional.ALL
        ],
    }


def _print(machine: "HardwareProfile") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for table in (_devices(machine), _features(machine), _packages(), _versions(machine)):
        console.print(table)
        console.print()
    for note in machine.notes:
        console.print(Text(f"Note: {note}"))


def _devices(machine: "HardwareProfile") -> "Table":
    table = new_table("Devices", "Device", "Generation", "Memory", "Units", "bf16 peak")
    shown = machine.devices if machine.host in machine.devices else (*machine.devices, machine.host)
    for device in shown:
        table.add_row(*_device_row(device))
    return table


def _device_row(device: "DeviceProfile") -> tuple[str, str, str, str, str]:
    from kpt_lightning.hardware.peaks import peak_flops

    generation = device.architecture
    if device.capability is not None:
        generation += f" {device.capability[0]}.{device.capability[1]}"
    units = f"{device.cores} cores" if device.multiprocessors is None else f"{device.multiprocessors} SMs"
    peak = peak_flops(device, "bfloat16")
    rate = "unknown" if peak is None else f"{peak.flops / 1e12:.0f} TFLOP/s"
    return device.name, generation, f"{device.memory_bytes / 2**30:.1f} GiB", units, rate


def _features(machine: "HardwareProfile") -> "Table":
    from kpt_lightning.hardware import features

    table = new_table("Features", "Feature", "Usable", "Reason")
    for name in features.NAMES:
        decision = machine.supports(name)
        table.add_row(name, "[green]yes[/]" if decision else "[yellow]no[/]", plain(decision.reason))
    return table


def _packages() -> "Table":
    from kpt_lightning import optional

    table = new_table("Optional packages here", "Package", "Version", "Used for")
    for package in optional.ALL:
        if package.available():
            table.add_row(package.distribution, package.version or "unknown", plain(package.purpose))
        else:
            text = f"{package.purpose}\n{package.pip_line}"
            table.add_row(package.distribution, "[yellow]missing[/]", plain(text))
    return table


def _versions(machine: "HardwareProfile") -> "Table":
    table = new_table("Versions", "What", "Version")
    for name, version in sorted(machine.versions.items()):
        table.add_row(name, plain(version))
    return table

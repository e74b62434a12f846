"""``kpt doctor``: what this machine is, what it can do and why, and which optional packages are missing."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
) -> None:
    """Show devices, features with reasons, optional packages and versions."""
    from kpt_lightning.hardware import HardwareProfile, detect

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


def _table(title: str, *columns: str) -> "Table":
    """A table that wraps long cells and never cuts them."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _devices(machine: "HardwareProfile") -> "Table":
    table = _table("Devices", "Device", "Generation", "Memory", "Units", "bf16 peak")
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

    table = _table("Features", "Feature", "Usable", "Reason")
    for name in features.NAMES:
        decision = machine.supports(name)
        table.add_row(name, "[green]yes[/]" if decision else "[yellow]no[/]", _plain(decision.reason))
    return table


def _packages() -> "Table":
    from kpt_lightning import optional

    table = _table("Optional packages here", "Package", "Version", "Used for")
    for package in optional.ALL:
        if package.available():
            table.add_row(package.distribution, package.version or "unknown", _plain(package.purpose))
        else:
            text = f"{package.purpose}\n{package.pip_line}"
            table.add_row(package.distribution, "[yellow]missing[/]", _plain(text))
    return table


def _versions(machine: "HardwareProfile") -> "Table":
    table = _table("Versions", "What", "Version")
    for name, version in sorted(machine.versions.items()):
        table.add_row(name, _plain(version))
    return table


def _plain(text: str) -> str:
    """Text whose square brackets, as in a pip line, are not read as markup."""
    from rich.markup import escape

    return escape(text)

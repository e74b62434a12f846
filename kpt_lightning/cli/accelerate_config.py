"""``kpt accelerate-config``: the two files that ``accelerate launch`` and kpt read, and the command that uses them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kpt_lightning.errors import ConfigError

if TYPE_CHECKING:
    from kpt_lightning.config import KptConfig
    from kpt_lightning.huggingface.accelerate_yaml import AccelerateSetup


def accelerate_config(
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="For Accelerate.")] = Path("acc.yaml"),
    kpt_output: Annotated[Path, typer.Option("--kpt-output", metavar="FILE", help="For kpt.")] = Path("kpt.yaml"),
    processes: Annotated[
        int | None, typer.Option("--processes", help="One for each device.  [default: the GPUs of this machine]")
    ] = None,
    parallel: Annotated[
        Literal["single", "ddp", "fsdp2"] | None,
        typer.Option("--parallel", help="How devices train together.  [default: ddp for several]"),
    ] = None,
    mixed_precision: Annotated[
        Literal["bf16", "no"] | None,
        typer.Option("--mixed-precision", help="Of Accelerate; FP8 is --precision.  [default: bf16 on a GPU]"),
    ] = None,
    level: Annotated[
        str | None, typer.Option("--level", help="What may change in the numbers: conservative, balanced, aggressive.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="Of kpt: auto, fp8, fp8-true, bf16, bf16-mixed, 32.")
    ] = None,
    cpu: Annotated[
        bool | None, typer.Option("--cpu/--gpu", help="Where training will run.  [default: what this machine has]")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: defaults for what is not given.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Write a config file for Accelerate and one for kpt, and print the command that trains with them.

    On a terminal it asks for what is not given.
    """
    from kpt_lightning.huggingface.accelerate_check import check_accelerate_yaml
    from kpt_lightning.huggingface.accelerate_yaml import USE_CPU_VARIABLE, setup_for_this_machine, write_text

    _check_outputs(output, kpt_output, overwrite)
    here = setup_for_this_machine()
    given: dict[str, Any] = {
        "cpu": cpu, "processes": processes, "parallel": parallel, "mixed_precision": mixed_precision,
        "level": level, "precision": precision,
    }  # fmt: skip
    if not yes and sys.stdin.isatty():
        given = _ask(given, here)
    setup, config = _setup(given, here), _settings(given)
    before = {path: path.read_bytes() if path.exists() else None for path in (output, kpt_output)}
    try:
        setup.write(output)
        write_text(kpt_output, "# For kpt; docs/config.md has every setting.\n" + config.to_yaml())
        # As Accelerate reads it, with what the printed command sets.
        check_accelerate_yaml(output, config, {USE_CPU_VARIABLE: "true"})
    except ConfigError:
        _put_back(before)
        raise
    typer.echo(f"{output}: {setup.processes} x {'CPU' if setup.cpu else 'GPU'}, {setup.parallel}")
    typer.echo(f"{kpt_output}: level {config.level}, precision {config.precision}")
    if setup.cpu and setup.processes > 1:
        typer.echo(f"Without {USE_CPU_VARIABLE}=true each process would train alone: Accelerate does not pass it on.")
    typer.echo(f"Next, with your own script for train.py:\n  {setup.command(output, kpt_output)}")


def _setup(given: dict[str, Any], here: "AccelerateSetup") -> "AccelerateSetup":
    """What was given, and for the rest what suits it."""
    from kpt_lightning.huggingface.accelerate_yaml import AccelerateSetup

    on_cpu = here.cpu if given["cpu"] is None else given["cpu"]
    count, kind = given["processes"], given["parallel"]
    if count is None:
        alone = kind == "single" or on_cpu != here.cpu
        count = max(2 if kind == "ddp" else 1, 1 if alone else here.processes)
    mixed = given["mixed_precision"]
    if mixed is None:
        plain = on_cpu or given["precision"] == "32" or (not here.cpu and here.mixed_precision == "no")
        mixed = "no" if plain else "bf16"
    return AccelerateSetup(
        parallel=kind or ("ddp" if count > 1 else "single"), processes=count, mixed_precision=mixed, cpu=on_cpu
    )


def _settings(given: dict[str, Any]) -> "KptConfig":
    """Only what was asked for: a line in the file counts as asked for."""
    from kpt_lightning.config import KptConfig

    return KptConfig.build(None, level=given["level"], precision=given["precision"])


def _ask(given: dict[str, Any], here: "AccelerateSetup") -> dict[str, Any]:
    """The same with answers for what was not given; a default is the answer to an empty line."""
    from kpt_lightning.config import Level, PrecisionName

    found = dict(given)
    if found["cpu"] is None:
        found["cpu"] = _choose("Where will training run?", ("gpu", "cpu"), "cpu" if here.cpu else "gpu") == "cpu"
    if found["processes"] is None:
        usual = _setup(found, here).processes
        found["processes"] = typer.prompt("How many processes (one for each device)?", default=usual, type=int)
    if found["parallel"] is None and found["processes"] > 1 and not found["cpu"]:
        found["parallel"] = _choose("How do they train together?", ("ddp", "fsdp2"), "ddp")
    if found["level"] is None:
        levels = tuple(level.value for level in Level)
        found["level"] = _unless_default(_choose("What may change in the numbers?", levels, Level.BALANCED.value))
    if found["precision"] is None:
        names = PrecisionName.__args__  # type: ignore[attr-defined]
        found["precision"] = _unless_default(_choose("Which precision?", names, "auto"))
    if found["mixed_precision"] is None:
        usual_precision = _setup(found, here).mixed_precision
        found["mixed_precision"] = _choose("Mixed precision of Accelerate?", ("bf16", "no"), usual_precision)
    return found


def _choose(question: str, choices: tuple[str, ...], default: str) -> str:
    """One of the choices; anything else is asked again."""
    while True:
        answer = str(typer.prompt(f"{question} ({', '.join(choices)})", default=default)).strip()
        if answer in choices:
            return answer
        typer.echo(f"{answer!r} is none of {', '.join(choices)}.")


def _unless_default(answer: str) -> str | None:
    return None if answer in ("auto", "balanced") else answer


def _check_outputs(output: Path, kpt_output: Path, overwrite: bool) -> None:
    """Before any question is asked."""
    if output.resolve() == kpt_output.resolve():
        raise ConfigError("--kpt-output", str(kpt_output), "is the same file as --output", "Give another name")
    for option, path in (("--output", output), ("--kpt-output", kpt_output)):
        if path.is_dir() or not path.resolve().parent.is_dir():
            rule = "is a directory" if path.is_dir() else "lies in a directory that is not there"
            raise ConfigError(option, str(path), rule, "Give the path of a file in a directory that exists")
        if path.exists() and not overwrite:
            raise ConfigError(option, str(path), "is there already", "Give another name, or add --overwrite")


def _put_back(before: dict[Path, bytes | None]) -> None:
    """Neither file stays where the pair is refused."""
    for path, content in before.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)

"""``kpt regress check``: is the newest run slower than those before it."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kpt_lightning.cli.regress_options import REGRESSION, TOO_LITTLE, Key, Name, Store, existing_history
from kpt_lightning.errors import ConfigError

if TYPE_CHECKING:
    from kpt_lightning.reports.findings import Finding


class FailOn(StrEnum):
    """From which severity on a regression fails the build, the least first."""

    MINOR = "minor"
    MODERATE = "moderate"
    SEVERE = "severe"


class Format(StrEnum):
    """Of what is printed or written."""

    TABLE = "table"
    JSON = "json"
    JUNIT = "junit"
    MARKDOWN = "markdown"
    GITHUB = "github"


def check(
    store: Store = None,
    key: Key = None,
    name: Name = None,
    new: Annotated[int, typer.Option("--new", min=1, help="How many of the newest runs of each key are judged.")] = 1,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="Judge this one; all by default.")] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Judge by the runs pinned as this.")] = None,
    fail_on: Annotated[FailOn, typer.Option("--fail-on", help="From which severity on to exit with 1.")] = FailOn.MINOR,
    form: Annotated[
        Format | None, typer.Option("--format", help="table by default; github is annotations of Actions.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Write the format there, and print the table.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    every: Annotated[bool, typer.Option("--all", help="A row for each metric, also for those that passed.")] = False,
) -> None:
    """Judge the newest runs of each key by those before them in the same environment.

    A regression stands, and fails each check, until it is fixed, accepted (kpt regress accept) or acknowledged (ack).
    """
    from kpt_lightning.reports.findings import describe
    from kpt_lightning.tracking.review import review

    if as_json and form not in (None, Format.JSON):
        raise ConfigError("--json", True, f"contradicts --format {form}", "Give one of them")
    form = Format.JSON if as_json else form or Format.TABLE
    history = existing_history(store)
    seen = review(history, new=new, metrics=metric, baseline=baseline, key=key, name=name)
    found = describe(seen, fail_on.value)
    if output is not None:
        _write(output, _text(found, form, fold=not every))
    if output is not None or form is Format.TABLE:
        _print(found, fold=not every)
    else:
        typer.echo(_text(found, form, fold=not every), nl=False)
    if seen.unstored:
        ended = ", ".join(f"{each.run_name} {each.metric}" for each in seen.unstored)
        typer.echo(
            f"kpt: {history.place!r} is read-only: not stored that these acknowledgements ended: {ended}", err=True
        )
    if any(each.state == "failing" for each in found):
        raise typer.Exit(REGRESSION)
    if not any(each.checked.judged for each in found):
        raise typer.Exit(TOO_LITTLE)


def _text(found: "list[Finding]", form: Format, *, fold: bool) -> str:
    from kpt_lightning.reports.annotations import to_annotations
    from kpt_lightning.reports.findings import to_data
    from kpt_lightning.reports.junit import to_junit
    from kpt_lightning.reports.markdown import to_markdown
    from kpt_lightning.reports.terminal import to_text

    if form is Format.JSON:
        return json.dumps([to_data(each) for each in found], indent=2, allow_nan=False) + "\n"
    if form is Format.TABLE:
        return to_text(found, fold=fold)
    if form is Format.MARKDOWN:
        return to_markdown(found, fold=fold)
    return to_junit(found) if form is Format.JUNIT else to_annotations(found)


def _write(output: Path, text: str) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise ConfigError("--output", str(output), rule, "Give a path that you may write") from error


def _print(found: "list[Finding]", *, fold: bool) -> None:
    from rich.console import Console

    from kpt_lightning.reports.findings import summary
    from kpt_lightning.reports.terminal import PLAIN_WIDTH, to_terminal

    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if wide else PLAIN_WIDTH, highlight=False)
    if found:
        console.print(to_terminal(found, console.width, fold=fold))
        console.print()
    console.print(summary(found), markup=False)

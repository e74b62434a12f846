"""What all commands of ``kpt regress`` share: options, exit statuses, and a history that must be there."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kpt_lightning.tracking.store import RunStore

REGRESSION, TOO_LITTLE = 1, 3
"""Exit status beside 0 and those of ``kpt`` itself."""

Store = Annotated[str | None, typer.Option("--store", help="Path or database URL; KPT_HISTORY or .kpt/runs.sqlite.")]
Key = Annotated[str | None, typer.Option("--key", help="Digest of a key, or its beginning; see kpt regress doctor.")]
Name = Annotated[str | None, typer.Option("--name", help="Only runs of this name.")]


def existing_history(location: str | None, *, reading: bool = True) -> "RunStore":
    """The history, which a mistyped path must not create.

    Args:
        location: As :class:`.RunStore` takes it.
        reading: Whether it may be one that cannot be written.

    Raises:
        typer.Exit: With status 3, after a line on stderr, where there is none.
    """
    from kpt_lightning.tracking.store import RunStore

    store = RunStore(location, reading=reading)
    if not store.exists():
        typer.echo(f"kpt: no history at {store.place!r}; check --store, or record a run first", err=True)
        raise typer.Exit(TOO_LITTLE)
    return store

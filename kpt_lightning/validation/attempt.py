"""Running code of others, a model or a loss: whatever it raises is told, not passed on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

LONGEST = 400


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """What a call returned."""

    value: T


@dataclass(frozen=True, slots=True)
class Failure:
    """What a call raised."""

    error: Exception

    @property
    def text(self) -> str:
        """Type and message on one line, cut where it is long."""
        line = " ".join(f"{type(self.error).__name__}: {self.error}".split())
        return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def attempt(run: Callable[[], T]) -> Done[T] | Failure:
    """Call a function of somebody else's; a wish to stop, such as Ctrl-C, passes through."""
    try:
        return Done(run())
    except Exception as error:  # noqa: BLE001  a model may raise anything
        return Failure(error)

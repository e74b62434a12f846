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
        return one_line(f"{type(self.error).__name__}: {self.error}", LONGEST)


def one_line(message: object, longest: int = 200) -> str:
    """A message without line breaks, cut where it is long."""
    text = " ".join(str(message).split())
    return text if len(text) <= longest else f"{text[:longest]}..."


def attempt(run: Callable[[], T]) -> Done[T] | Failure:
    """Call a function of somebody else's; a wish to stop, such as Ctrl-C, passes through."""
    try:
        return Done(run())
    except Exception as error:  # noqa: BLE001  a model may raise anything
        return Failure(error)

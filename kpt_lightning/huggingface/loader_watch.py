"""Seeing each batch that a loader hands out, whoever iterates it."""

from collections.abc import Callable, Iterator
from typing import Any

_set_class = vars(object)["__class__"].__set__
# Accelerate's loaders answer __class__ with that of the loader inside, and let nobody set it.


class LoaderWatch:
    """From its making on every iteration of a loader is told, until :meth:`remove`."""

    def __init__(
        self, loader: Any, *, asked: Callable[[], None] | None = None, given: Callable[[Any], None] | None = None
    ) -> None:
        """Watch; a loader of a class that allows no subclass stays unwatched.

        The object gets a subclass of its own class, of the same name. An iteration that runs already is not seen.

        Args:
            loader: Any iterable object.
            asked: Called before each batch is asked for.
            given: Called with each batch.
        """
        self._loader, self._original = loader, type(loader)
        original = self._original

        def __iter__(self: Any) -> Iterator[Any]:
            batches = iter(original.__iter__(self))
            while True:
                if asked is not None:
                    asked()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                if given is not None:
                    given(batch)
                yield batch

        body = {"__iter__": __iter__, "__module__": original.__module__, "__doc__": original.__doc__}
        self._watched: type | None = type(original.__name__, (original,), body)
        try:
            _set_class(loader, self._watched)
        except TypeError:
            self._watched = None

    @property
    def watches(self) -> bool:
        """Whether batches are seen."""
        return self._watched is not None

    def remove(self) -> None:
        """Give the loader its own class back."""
        if self._watched is not None and type(self._loader) is self._watched:
            _set_class(self._loader, self._original)
        self._watched = None

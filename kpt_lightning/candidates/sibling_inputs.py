"""Finding linear layers of one module that are called on the very same tensor, by watching a forward pass."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


def siblings_with_one_input(model: nn.Module, run: Callable[[], Any], *, wrapped: bool = False) -> list[list[str]]:
    """Run once, all of it in eager mode, and compare the inputs of the linear children of each module by identity.

    Args:
        model: Whose modules are watched.
        run: Does a forward pass.
        wrapped: Also children of children, as in the wrapper that an adapter puts around a layer.

    Returns:
        Groups of two or more names, each in the order of the calls: in every call of their parent all were called
        once, with one positional argument, the same tensor object.
    """
    families = [(name, parent, _children(parent, wrapped)) for name, parent in model.named_modules()]
    watches = [_Watch(name, parent, children) for name, parent, children in families if len(children) > 1]
    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
        for watch in watches:
            watch.attach(hooks)
        run()
    found = [tuple(group) for watch in watches for group in watch.groups()]
    # A grandparent sees the children of each of its children too.
    return [list(group) for group in dict.fromkeys(found)]


def _children(parent: nn.Module, wrapped: bool) -> dict[str, nn.Linear]:
    found = {}
    for name, child in parent.named_children():
        if isinstance(child, nn.Linear):
            found[name] = child
        elif wrapped:
            inside = {f"{name}.{key}": each for key, each in child.named_children() if isinstance(each, nn.Linear)}
            found |= inside if len(inside) == 1 else {}
    return found


class _Watch:
    """The calls of one parent."""

    def __init__(self, name: str, parent: nn.Module, children: dict[str, nn.Linear]) -> None:
        self.parent, self.prefix, self.children = parent, f"{name}." if name else "", children
        # One entry per call of the parent: the children's names and inputs, in order.
        self.open: list[tuple[str, Tensor | None]] | None = None
        self.calls: list[list[list[str]]] = []

    def attach(self, hooks: ExitStack) -> None:
        begin = self.parent.register_forward_pre_hook(lambda *_: self._begin())
        end = self.parent.register_forward_hook(lambda *_: self._end(), always_call=True)
        hooks.callback(begin.remove)
        hooks.callback(end.remove)
        for name, child in self.children.items():
            hooks.callback(child.register_forward_pre_hook(self._noter(name), with_kwargs=True).remove)

    def groups(self) -> list[list[str]]:
        """Those that were formed in every call alike."""
        common = [group for group in self.calls[0] if all(group in call for call in self.calls)] if self.calls else []
        return [[self.prefix + name for name in group] for group in common]

    def _begin(self) -> None:
        self.open = []

    def _noter(self, name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.open is not None:
                plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
                self.open.append((name, args[0] if plain else None))

        return note

    def _end(self) -> None:
        noted, self.open = self.open or [], None
        once = [(name, x) for name, x in noted if x is not None and sum(name == other for other, _ in noted) == 1]
        groups: list[list[str]] = []
        # The tensors are alive here, so identities are not reused.
        for x in {id(each): each for _, each in once}.values():
            names = [name for name, other in once if other is x]
            if len(names) > 1:
                groups.append(names)
        self.calls.append(groups)

"""Tensors in whatever forwards take and return: containers that torch knows, and objects that it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["mapped", "tensors_in"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in any containers, and in the attributes of objects that torch knows nothing of."""
    seen: set[int] = set()
    left = [value]
    while left:
        leaves = tree_flatten(left.pop())[0]
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                yield leaf
            elif id(leaf) not in seen and not isinstance(leaf, (nn.Module, type)):
                seen.add(id(leaf))
                left += list(leaf) if isinstance(leaf, (set, frozenset)) else []
                left += _attributes(leaf).values()


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with every tensor in it changed; the containers and objects that hold any are copies."""
    copies: dict[int, Any] = {}

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, (nn.Module, type)) or next(tensors_in(leaf), None) is None:
            return leaf
        if id(leaf) not in copies:
            own = copies[id(leaf)] = copy.copy(leaf)
            for name, part in _attributes(leaf).items():
                object.__setattr__(own, name, tree_map(of_leaf, part))  # also where it is frozen
        return copies[id(leaf)]

    return tree_map(of_leaf, value)


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds by name, in its dict and in its slots."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}

"""Tensors in whatever forwards take and return: containers that torch knows, and objects that it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["listed", "mapped", "tensors_in"]

_ENDLESS = 1000  # items of an iterator after which it is taken to have no end
_CLOSED = (nn.Module, type, ModuleType, FunctionType, MethodType, str, bytes)


def listed(value: Any) -> Any:
    """The value with every iterator in it run to its end.

    Raises:
        ValueError: It has none.
    """

    def run(leaf: Any) -> Any:
        if not isinstance(leaf, Iterator):
            return leaf
        items = list(islice(leaf, _ENDLESS + 1))
        if len(items) > _ENDLESS:
            raise ValueError("an iterator without an end")
        return items

    return tree_map(run, value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in any containers, and in the attributes of objects that torch knows nothing of."""
    seen: set[int] = set()
    left = [value]
    while left:
        leaves = tree_flatten(left.pop())[0]
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                yield leaf
            elif id(leaf) not in seen and not isinstance(leaf, _CLOSED):
                seen.add(id(leaf))
                if isinstance(leaf, Mapping):
                    left += leaf.values()
                elif isinstance(leaf, Collection):
                    left += leaf
                left += _attributes(leaf).values()


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with every tensor in it changed; the containers and objects that hold any are copies.

    An object that cannot be copied stays as it is.
    """
    copies: dict[int, Any] = {}

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf
            if not isinstance(leaf, _CLOSED) and next(tensors_in(leaf), None) is not None:
                copies[id(leaf)] = _copy(leaf)
                for name, part in _attributes(leaf).items() if copies[id(leaf)] is not leaf else ():
                    object.__setattr__(copies[id(leaf)], name, tree_map(of_leaf, part))  # also where it is frozen
        return copies[id(leaf)]

    return tree_map(of_leaf, value)


def _copy(value: Any) -> Any:
    """A copy whose attributes can be set, or the value itself."""
    try:
        own = copy.copy(value)
        for name, part in _attributes(own).items():
            object.__setattr__(own, name, part)
    except Exception:  # whatever an object's own ways of copying raise
        return value
    return own


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds by name, in its dict and in its slots."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            is_private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if is_private else slot
            if not slot.endswith("__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found

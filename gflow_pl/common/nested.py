"""Tensors in nested containers, and in the attributes of other objects: batches, arguments and outputs of a forward."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["copy_nested", "exhaust_iterators", "iter_tensors", "map_tensors", "on_copies"]

_Value = TypeVar("_Value")
_Model = TypeVar("_Model")
_Result = TypeVar("_Result")

_MAX_ITEMS = 1000  # an iterator with more items is considered infinite
_OPAQUE = (nn.Module, type, ModuleType, FunctionType, MethodType, str, bytes)  # never searched for tensors


def iter_tensors(value: object) -> Iterator[Tensor]:
    """Yield every tensor in a value; a tensor that can be reached in several ways may be yielded several times.

    Searches lists, tuples, dicts and every other container that `torch.utils._pytree` knows, other mappings and
    collections, and the attributes of any other object (data classes, images with annotations, ...). Modules, classes
    and functions are not searched.
    """
    for leaf in _iter_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf


def _iter_leaves(value: object) -> Iterator[object]:
    """Yield everything that `iter_tensors` searches, tensors and modules included."""
    seen: set[int] = set()
    queue: deque[object] = deque([value])
    while queue:
        leaves = tree_flatten(queue.popleft())[0]
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                yield leaf
            elif id(leaf) not in seen:
                seen.add(id(leaf))
                yield leaf
                if isinstance(leaf, _OPAQUE):
                    continue
                if isinstance(leaf, Mapping):
                    queue += leaf.values()
                elif isinstance(leaf, Collection):
                    queue += leaf
                queue += _attributes(leaf).values()


def map_tensors(value: _Value, change: Callable[[Tensor], Tensor]) -> _Value:
    """Return a copy of a nested value with `change` applied to every tensor in it.

    Containers and objects that hold tensors are copied, everything else is shared. An object that cannot be copied
    stays as it is, with its tensors unchanged.
    """
    copies: dict[int, Any] = {}

    def map_leaf(leaf: object) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf
            if not isinstance(leaf, _OPAQUE) and next(iter_tensors(leaf), None) is not None:
                duplicate = copies[id(leaf)] = _copy(leaf)
                if duplicate is leaf:
                    return leaf
                for name, part in _attributes(leaf).items():
                    # Bypass the class's own __setattr__: that of a frozen data class raises an error.
                    object.__setattr__(duplicate, name, tree_map(map_leaf, part))
                # pytree takes subclasses of dict and list for leaves.
                for key, part in _items(leaf):
                    _set_item(duplicate, key, tree_map(map_leaf, part))
        return copies[id(leaf)]

    return tree_map(map_leaf, value)


def copy_nested(value: _Value, change: Callable[[Tensor], Tensor]) -> _Value:
    """Return a deep copy of a nested value, with every tensor replaced by `change` of it; modules are shared.

    Unlike with `map_tensors`, containers without tensors are copied as well, and a tensor that occurs several times is
    changed once. What cannot be copied deeply is copied as far as `map_tensors` can.
    """
    memo: dict[int, Any] = {}
    for leaf in _iter_leaves(value):
        if isinstance(leaf, Tensor):
            if id(leaf) not in memo:
                memo[id(leaf)] = change(leaf)
        elif isinstance(leaf, (nn.Module, ModuleType)):
            memo[id(leaf)] = leaf
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a class may raise anything when it is copied
        return map_tensors(value, lambda tensor: memo[id(tensor)] if id(tensor) in memo else change(tensor))


def on_copies(function: Callable[[_Model, _Value], _Result]) -> Callable[[_Model, _Value], _Result]:
    """Wrap a function of a model and a batch, so that the function may change the batch: it gets a copy."""

    @functools.wraps(function)
    def run(model: _Model, batch: _Value) -> _Result:
        return function(model, copy_nested(batch, Tensor.clone))

    return run


def exhaust_iterators(value: object) -> Any:
    """Return a nested value with every iterator in it replaced by the list of its items.

    A forward may return a generator, which computes nothing until it is iterated.

    Raises:
        ValueError: An iterator has more than 1000 items and is probably infinite.
    """

    def exhaust(leaf: object) -> object:
        if not isinstance(leaf, Iterator):
            return leaf
        items = list(islice(leaf, _MAX_ITEMS + 1))
        if len(items) > _MAX_ITEMS:
            raise ValueError(f"an iterator with more than {_MAX_ITEMS} items")
        return items

    return tree_map(exhaust, value)


def _items(value: object) -> Iterable[tuple[Any, object]]:
    """Return the keys and items of a dict, or the positions and items of a list; nothing for other objects."""
    if isinstance(value, dict):
        return list(value.items())
    return enumerate(value) if isinstance(value, list) else ()


def _set_item(container: Any, key: Any, part: object) -> None:
    """Set an item of a dict or list, also if its class refuses changes."""
    kind = next(cls for cls in (OrderedDict, dict, list) if isinstance(container, cls))
    kind.__setitem__(container, key, part)


def _copy(value: object) -> Any:
    """Return a shallow copy whose attributes can be set, or the value itself if there is no such copy."""
    try:
        duplicate = copy.copy(value)
        for name, part in _attributes(duplicate).items():
            object.__setattr__(duplicate, name, part)
    except Exception:  # a class may raise anything when it is copied
        return value
    return duplicate


def _attributes(value: object) -> dict[str, Any]:
    """Return the instance attributes of an object, from its ``__dict__`` and from its slots."""
    found = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            is_private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{cls.__name__.lstrip('_')}{slot}" if is_private else slot  # Python mangles private names
            if not slot.endswith("__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found

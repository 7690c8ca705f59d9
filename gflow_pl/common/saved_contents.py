"""Save the contents of containers, objects and generators, and restore them without calling code of their classes."""

from __future__ import annotations

import functools
import gc
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from types import FunctionType, MappingProxyType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = ["SavedContents"]

_Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]
_Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState

# The classes of most attributes come first in every check.
_IMMUTABLE = frozenset([type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device])
_PLAIN = frozenset([dict, list, set, deque, OrderedDict])
_OPAQUE = (type, ModuleType, FunctionType, torch.jit.ScriptModule, Dataset, DataLoader)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)

# Objects of these packages are not visited: they hold threads, files, loggers, or the whole training run.
_FOREIGN = (frozenset(sys.stdlib_module_names) | {"torch", "lightning", "pytorch_lightning", "lightning_fabric"}) - {
    "collections",
    "types",
    "__main__",
}
_MAX_ITEMS = 10_000  # larger containers and arrays inside of objects are data sets, which a forward does not change
_UNSET = object()

# Objects that cannot change themselves, to what they hold.
_READ_ONLY: dict[type, Callable[[Any], Iterable[object]]] = {
    MappingProxyType: gc.get_referents,
    MethodType: lambda method: (method.__self__,),
    functools.partial: lambda call: (call.func, call.args, call.keywords),
}


class _Kind(NamedTuple):
    """How to read and write a kind of container by the methods of the built-in class.

    A subclass may refuse changes (the frozen configurations of some libraries), or count them. Its methods are not
    called.

    Attributes:
        read: Returns the items.
        write: Replaces the items.
    """

    read: Callable[[Any], list[Any]]
    write: Callable[[Any, list[Any]], None]


def _write_dict(container: Any, items: list[Any]) -> None:
    dict.clear(container)
    dict.update(container, items)


def _write_ordered_dict(container: Any, items: list[Any]) -> None:
    OrderedDict.clear(container)
    for key, value in items:
        OrderedDict.__setitem__(container, key, value)


def _write_list(container: Any, items: list[Any]) -> None:
    list.__setitem__(container, slice(None), items)


def _write_set(container: Any, items: list[Any]) -> None:
    set.clear(container)
    set.update(container, items)


def _write_deque(container: Any, items: list[Any]) -> None:
    deque.clear(container)
    deque.extend(container, items)


_KINDS: dict[type, _Kind] = {
    OrderedDict: _Kind(lambda c: list(OrderedDict.items(c)), _write_ordered_dict),
    dict: _Kind(lambda c: list(dict.items(c)), _write_dict),
    list: _Kind(list.copy, _write_list),
    set: _Kind(lambda c: list(set.__iter__(c)), _write_set),
    deque: _Kind(lambda c: list(deque.__iter__(c)), _write_deque),
}


class SavedContents:
    """The contents of all containers, objects and random generators that can be reached from some values.

    Nothing is called that a user's class defines: items are read and written by the methods of the built-in classes,
    and attributes through the instance's dict and its slots. Therefore `restore` succeeds for classes that refuse
    changes, too. Tuples, and mappings and objects that are read-only, are visited for what they hold.

    Data sets, and objects of the standard library, of torch and of Lightning (Trainer, loggers, threads) are not
    visited.

    Args:
        values: The values to start from.
        max_items: Containers inside of other containers are visited only if they have at most this many items; None for
            any number.
        known: ids of modules and parameters that are saved elsewhere and not visited.
        owner: Object whose slots are saved, too.

    Attributes:
        tensors: The tensors found.
    """

    def __init__(
        self,
        values: Iterable[object],
        *,
        max_items: int | None = None,
        known: Collection[int] = frozenset(),
        owner: object = None,
    ) -> None:
        self.tensors: list[Tensor] = []
        self._max_items, self._known = max_items, known
        self._empty: list[_Container] = []
        self._plain: list[tuple[Any, Any]] = []
        self._checked: list[tuple[Any, _Kind, list[Any]]] = []
        self._slots: list[tuple[object, Any, object]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._generators: list[tuple[Callable[[Any], Any], object]] = []
        self._seen: set[int] = set()
        # Further values, each with whether they are inside of an object.
        self._queue: deque[tuple[Iterable[object], bool]] = deque()
        self._visit(values, is_in_object=False, is_nested=False)
        if owner is not None:
            self._save_slots(owner)
        while self._queue:
            more, is_in_object = self._queue.popleft()
            self._visit(more, is_in_object=is_in_object, is_nested=True)

    # -- saving --------------------------------------------------------------------------------------------------------

    def _visit(self, values: Iterable[object], *, is_in_object: bool, is_nested: bool) -> None:
        for value in values:
            cls = value.__class__
            if cls in _IMMUTABLE or id(value) in self._known:
                continue
            if cls in _PLAIN and not value:
                self._empty.append(value)  # type: ignore[arg-type]
            elif cls is dict and not is_in_object and not is_nested:  # the most frequent attributes of modules
                self._plain.append((value, value.copy()))  # type: ignore[attr-defined]
                if self._max_items is None or len(value) <= self._max_items:  # type: ignore[arg-type]
                    self._queue.append((value.values(), False))  # type: ignore[attr-defined]
            elif cls is not tuple or value:
                self._visit_one(value, is_in_object, is_nested)

    def _visit_one(self, value: Any, is_in_object: bool, is_nested: bool) -> None:
        """Save one value, if it can change, and queue what it holds."""
        cls = type(value)
        if id(value) in self._seen or issubclass(cls, _OPAQUE):
            return
        if issubclass(cls, Tensor):
            self.tensors.append(value)
            return
        self._seen.add(id(value))
        kind = next((_KINDS[base] for base in cls.__mro__ if base in _KINDS), None)
        if kind is not None or issubclass(cls, tuple):
            self._save_container(value, kind, is_in_object, is_nested)
        elif issubclass(cls, _GENERATORS):
            if not issubclass(cls, random.SystemRandom):
                self._generators.append(_state_setter(value))
            return
        elif issubclass(cls, np.ndarray):
            if value.size <= _MAX_ITEMS and value.flags.writeable:
                self._arrays.append((value, value.copy()))
            return
        elif cls in _READ_ONLY:
            self._queue.append((_READ_ONLY[cls](value), is_in_object))
            return
        if cls not in _PLAIN and cls is not tuple:
            self._save_attributes(value, cls, is_container=kind is not None)

    def _save_container(self, value: Any, kind: _Kind | None, is_in_object: bool, is_nested: bool) -> None:
        limit = _MAX_ITEMS if is_in_object else self._max_items
        items = list(tuple.__iter__(value)) if kind is None else kind.read(value)
        if is_nested and limit is not None and len(items) > limit:
            return
        if type(value) in _PLAIN and not is_in_object:
            self._plain.append((value, value.copy()))
        elif kind is not None:
            self._checked.append((value, kind, items))
        if self._max_items is not None and len(items) > self._max_items:
            return  # a data set: its items are not visited
        is_mapping = kind is not None and kind.read in (_KINDS[dict].read, _KINDS[OrderedDict].read)
        self._queue.append(([item for _, item in items] if is_mapping else items, is_in_object))

    def _save_attributes(self, value: object, cls: type, *, is_container: bool) -> None:
        """Save the attributes of an object, in its dict and in its slots."""
        is_module = issubclass(cls, nn.Module)
        if not is_module and not is_container and cls.__module__.partition(".")[0] in _FOREIGN:
            return
        attributes = _instance_dict(value)
        if attributes:
            self._checked.append((attributes, _KINDS[dict], list(attributes.items())))
            self._queue.append((list(attributes.values()), True))
        self._save_slots(value)

    def _save_slots(self, value: object) -> None:
        """Save the attributes of an object that are in slots."""
        for cls in type(value).__mro__:
            if "__slots__" not in vars(cls) or cls in _KINDS:
                continue
            for descriptor in [part for part in vars(cls).values() if type(part) is MemberDescriptorType]:
                held = _slot_value(value, descriptor)
                self._slots.append((value, descriptor, held))
                if held is not _UNSET:
                    self._queue.append(((held,), True))

    @property
    def is_plain(self) -> bool:
        """Whether there are only built-in containers of tensors and numbers, which can certainly be restored."""
        return not (self._checked or self._slots or self._arrays or self._generators)

    # -- restoring -----------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Restore all contents, in place."""
        for container in self._empty:
            if container:
                container.clear()
        for container, items in self._plain:
            container.clear()
            if isinstance(container, (list, deque)):
                container.extend(items)
            else:
                container.update(items)
        # Containers of other classes are written only if they have changed.
        for container, kind, items in self._checked:
            if not _are_same(kind.read(container), items):
                kind.write(container, items)
        for owner, descriptor, held in self._slots:
            if _slot_value(owner, descriptor) is held:
                continue
            if held is _UNSET:
                descriptor.__delete__(owner)
            else:
                descriptor.__set__(owner, held)
        for array, values in self._arrays:
            array[...] = values
        for set_state, state in self._generators:
            set_state(state)


def _instance_dict(value: object) -> dict[str, Any]:
    """Return the dict that holds the attributes of an object; an empty one if it has none."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return attributes if type(attributes) is dict else {}


def _slot_value(owner: object, descriptor: Any) -> object:
    """Return the value of a slot; `_UNSET` if it has none."""
    try:
        return descriptor.__get__(owner, type(owner))
    except AttributeError:
        return _UNSET


def _are_same(now: list[Any], before: list[Any]) -> bool:
    """Return whether two lists hold the same objects; of pairs, keys and values are compared."""
    if len(now) != len(before):
        return False
    return all(
        a is b or (type(a) is tuple and type(b) is tuple and len(a) == len(b) == 2 and a[0] is b[0] and a[1] is b[1])
        for a, b in zip(now, before, strict=True)
    )


def _state_setter(generator: _Generator) -> tuple[Callable[[Any], Any], object]:
    """Return the function that sets the state of a generator, and the state to call it with."""
    if isinstance(generator, random.Random):
        return functools.partial(random.Random.setstate, generator), random.Random.getstate(generator)
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return functools.partial(setattr, bits, "state"), bits.state
    return generator.set_state, generator.get_state()

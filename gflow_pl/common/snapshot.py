"""Snapshots of modules, tensors and random generators, to undo what a forward pass or a training step changes."""

from __future__ import annotations

import functools
import gc
import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "ModuleSnapshot",
    "TensorSnapshot",
    "garbage_collection_paused",
    "random_states_restored",
    "restored_afterwards",
    "seed_generators",
]

_Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
_Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]

_IMMUTABLE = frozenset(
    [type(None), bool, int, float, str, nn.Parameter]
)  # the classes of most attributes: skipped early
_CONTAINERS = (dict, list, set, deque, tuple)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


class ModuleSnapshot:
    """The state of one module (not of its submodules), taken when the snapshot is created.

    `restore` can be called any number of times. It restores:

    - every attribute, including parameters, buffers, hooks and the training flag: attributes that were added are
      deleted, attributes that were replaced or deleted get their former value back;
    - the items of the lists, dicts, sets and deques among the attributes, in place;
    - the state of the random generators among the attributes;
    - with `copy_tensors`, the values of buffers and of tensors that are plain attributes, in place.

    Values of parameters are never copied. Tensors without storage of their own (meta, nested and inference tensors) are
    restored by reference only.

    Args:
        module: The module.
        exclude: Names of attributes that are neither saved nor restored.
        nested: Whether containers inside containers are saved, too. False bounds the cost for modules that keep a data
            set: only the attributes themselves and the buffers are visited.
        copy_tensors: Whether the values of buffers and of other tensors that are not parameters are copied and
            restored.

    Attributes:
        tensors: The buffers and other tensors found that are not parameters.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> snapshot = ModuleSnapshot(norm, copy_tensors=True)
        >>> output = norm(torch.ones(4, 2))
        >>> snapshot.restore()
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(
        self, module: nn.Module, *, exclude: Collection[str] = (), nested: bool = True, copy_tensors: bool = False
    ) -> None:
        self._live_attributes = vars(module)
        self._exclude = exclude
        self._attributes = {name: value for name, value in vars(module).items() if name not in exclude}
        self._empty: list[_Container] = []
        self._items: list[tuple[_Container, _Container]] = []
        self._generators: list[tuple[Callable[[Any], Any], object]] = []
        self.tensors: list[Tensor] = []
        self._visit(self._attributes.values(), set(), nested)
        # Buffers are in a dict of their own, whose items are visited only with `nested`.
        if not nested and "_buffers" in self._attributes:
            self._visit(module._buffers.values(), set(), nested)
        self._contents = _tensor_snapshots(self.tensors) if copy_tensors else []

    def _visit(self, values: Iterable[object], seen: set[int], nested: bool) -> None:
        """Save containers and random generators, and collect tensors in `self.tensors`.

        Args:
            values: The values to visit. Tuples are not saved, because they cannot change. Empty containers are saved
                without a copy, because `restore` only clears them.
            seen: Ids of the containers that were visited before. This call adds to it.
            nested: Whether the items of containers are visited, too.
        """
        for value in values:
            if value.__class__ in _IMMUTABLE:
                continue
            if isinstance(value, _CONTAINERS):
                if not value:
                    if not isinstance(value, tuple):
                        self._empty.append(value)
                elif id(value) not in seen:
                    seen.add(id(value))
                    if not isinstance(value, tuple):
                        self._items.append((value, value.copy()))
                    if nested:
                        self._visit(value.values() if isinstance(value, dict) else value, seen, nested)
            elif isinstance(value, Tensor):
                self.tensors.append(value)
            elif isinstance(value, _GENERATORS) and not isinstance(value, random.SystemRandom):
                self._generators.append(_state_setter(value))

    def restore(self) -> None:
        """Restore the module to its state at the time of the snapshot."""
        for container in self._empty:
            if container:
                container.clear()
        for container, items in self._items:
            container.clear()
            if isinstance(container, (list, deque)):
                container.extend(items)
            else:
                container.update(items)
        live = self._live_attributes
        if self._exclude:
            for name in [name for name in live if name not in self._attributes and name not in self._exclude]:
                del live[name]
        else:
            live.clear()  # much faster than looking for added attributes, in a trace of a large network
        live.update(self._attributes)
        for set_state, state in self._generators:
            set_state(state)
        for contents in self._contents:
            contents.restore(compare=False)


class TensorSnapshot:
    """The values of one tensor, to be restored in place.

    Args:
        tensor: A tensor with storage of its own: no meta, nested or inference tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version, self._values = tensor, tensor._version, tensor.detach().clone()

    @staticmethod
    def is_possible(tensor: Tensor) -> bool:
        """Return whether the values of a tensor can be saved and restored."""
        return not (tensor.is_meta or tensor.is_inference() or tensor.is_nested)

    @torch.no_grad()
    def restore(self, *, compare: bool = True) -> None:
        """Restore the values, also where the tensor was resized or its storage was replaced.

        Args:
            compare: Whether to write only where something has changed, which makes the host wait for the device.
                Without, the values are always written, and the version counter stays: a batch norm in training mode
                does not increase it either, so that it cannot tell what has changed.
        """
        tensor, values = self._tensor, self._values
        if tensor.shape != values.shape:
            tensor.data = values
        elif not compare:
            tensor.data.copy_(values)
        elif tensor._version != self._version or (tensor.layout == torch.strided and not _is_equal(tensor, values)):
            tensor.copy_(values)


def _tensor_snapshots(tensors: Iterable[Tensor]) -> list[TensorSnapshot]:
    return [TensorSnapshot(tensor) for tensor in tensors if TensorSnapshot.is_possible(tensor)]


def _is_equal(tensor: Tensor, values: Tensor) -> bool:
    """Return whether two tensors are equal, where NaN counts as equal to NaN."""
    return bool(torch.eq(tensor, values).logical_or_((tensor != tensor) & (values != values)).all())


def _state_setter(generator: _Generator) -> tuple[Callable[[Any], Any], object]:
    """Return the function that sets the state of a generator, and the state to call it with."""
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return functools.partial(setattr, bits, "state"), bits.state
    return generator.set_state, generator.get_state()


@contextmanager
def restored_afterwards(snapshots: Sequence[ModuleSnapshot], tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore modules, tensors and all global random generators at the end of the block.

    Args:
        snapshots: Snapshots of the modules that the block may change.
        tensors: Tensors whose values are saved now and restored as well.
    """
    contents = _tensor_snapshots(tensors)
    try:
        with random_states_restored():
            yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()
        for tensor in contents:
            tensor.restore()


@contextmanager
def random_states_restored() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch (CPU, CUDA, MPS) at the end of the block."""
    python, numpy, host = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = torch.cuda.get_rng_state_all() if cuda else []
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(host)
        if cuda:
            torch.cuda.set_rng_state_all(devices)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch; those of CUDA only where CUDA is initialized already."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector for a block that creates many objects and keeps all of them to its end.

    Without a pause the collector would visit these objects over and over and free none.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

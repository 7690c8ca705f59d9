"""Whatever a forward does to a module and to the random generators, afterwards it never happened."""

from __future__ import annotations

import functools
import gc
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Kept", "uncollected", "untouched"]

_PLAIN = frozenset([type(None), bool, int, float, str, nn.Parameter])  # what most attributes are
_CONTAINERS = (dict, list, set, deque, tuple)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


class Kept:
    """A module's attributes, and what plain containers among them (and in these) hold: hooks, tensors, caches of a forward.

    Generators that a module owns are wound back, too.

    Attributes:
        tensors: Those among them that are no parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.own = vars(module)
        self.attributes = self.own.copy()
        self.empty: list[Any] = []
        self.contents: list[tuple[Any, Any]] = []
        self.tensors: list[Tensor] = []
        self.generators: list[tuple[Callable[[Any], Any], Any]] = []
        self._keep(self.attributes.values(), set())

    def _keep(self, values: Iterable[Any], seen: set[int]) -> None:
        for value in values:
            if value.__class__ in _PLAIN:
                continue
            if isinstance(value, _CONTAINERS):
                if not value:
                    self.empty.append(value)
                elif id(value) not in seen:
                    seen.add(id(value))
                    if not isinstance(value, tuple):
                        self.contents.append((value, value.copy()))
                    self._keep(value.values() if isinstance(value, dict) else value, seen)
            elif isinstance(value, Tensor):
                self.tensors.append(value)
            elif isinstance(value, _GENERATORS) and not isinstance(value, random.SystemRandom):
                self.generators.append(_rewinding(value))

    def put_back(self) -> None:
        """Makes it what it was."""
        for value in self.empty:
            if value:
                value.clear()
        for value, contents in self.contents:
            value.clear()
            if isinstance(value, (list, deque)):
                value.extend(contents)
            else:
                value.update(contents)
        self.own.clear()
        self.own.update(self.attributes)
        for rewind, state in self.generators:
            rewind(state)


def _rewinding(generator: Any) -> tuple[Callable[[Any], Any], Any]:
    """What sets a generator, and its state now."""
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return functools.partial(setattr, bits, "state"), bits.state
    return generator.set_state, generator.get_state()


@contextmanager
def _random_state() -> Iterator[None]:
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


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is looked for inside the block: it makes many small objects, and keeps all of them to its end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def untouched(modules: Sequence[Kept], tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restores modules' attributes, tensors' places, flags and hooks, and all random generators.

    Args:
        modules: They may be changed in any way inside the block, and are afterwards what they were when they were kept.
        tensors: Those whose contents are saved and restored too (where the forward runs on the real ones).
    """
    contents = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors if _may_be_written(tensor)]
    try:
        with _random_state():
            yield
    finally:
        for module in modules:
            module.put_back()
        with torch.no_grad():
            for tensor, version, value in contents:
                _restore(tensor, version, value)


def _may_be_written(tensor: Tensor) -> bool:
    return not (tensor.is_meta or tensor.is_inference() or tensor.is_nested)


def _restore(tensor: Tensor, version: int, value: Tensor) -> None:
    """Puts the contents back, also those of a tensor that was given another size or memory."""
    if tensor.shape != value.shape:
        tensor.data = value
    elif tensor._version != version or (tensor.layout == torch.strided and not _is_equal(tensor, value)):
        tensor.copy_(value)


def _is_equal(tensor: Tensor, value: Tensor) -> bool:
    """Whether they hold the same, numbers that are none included."""
    return bool(torch.eq(tensor, value).logical_or_((tensor != tensor) & (value != value)).all())

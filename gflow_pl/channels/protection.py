"""Whatever a forward does to a module and to the random generators, afterwards it never happened."""

from __future__ import annotations

import gc
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Kept", "uncollected", "untouched"]

_CONTAINERS = (dict, list, set, deque, tuple)


class Kept:
    """A module's attributes, and what plain containers among them (and in these) hold: hooks, tensors, caches of a forward."""

    def __init__(self, module: nn.Module) -> None:
        self.own = vars(module)
        self.attributes = self.own.copy()
        self.contents: list[tuple[Any, Any]] = []
        self._keep(self.attributes.values(), set())

    def _keep(self, values: Iterable[Any], seen: set[int]) -> None:
        for value in values:
            if not isinstance(value, _CONTAINERS) or id(value) in seen:
                continue
            seen.add(id(value))
            if not isinstance(value, tuple):
                self.contents.append((value, value.copy() if value else None))
            if value:
                self._keep(value.values() if isinstance(value, dict) else value, seen)

    def put_back(self) -> None:
        """Makes it what it was."""
        for value, contents in self.contents:
            if contents is None:
                if value:
                    value.clear()
            elif isinstance(value, (list, deque)):
                value.clear()
                value.extend(contents)
            else:
                value.clear()
                value.update(contents)
        self.own.clear()
        self.own.update(self.attributes)


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
def untouched(modules: Iterable[Kept], buffers: Iterable[Tensor]) -> Iterator[None]:
    """Restores modules' attributes, tensors' places, flags and hooks, and all random generators.

    Args:
        modules: They may be changed in any way inside the block, and are afterwards what they were when they were kept.
        buffers: Those whose contents are saved and restored too (where the forward runs on the real ones).
    """
    contents = [(buffer, buffer.detach().clone()) for buffer in buffers]
    try:
        with _random_state():
            yield
    finally:
        for module in modules:
            module.put_back()
        with torch.no_grad():
            for buffer, value in contents:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

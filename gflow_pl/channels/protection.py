"""Whatever a forward does to a module and to the random generators, afterwards it never happened."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["untouched"]

_CONTAINERS = (dict, list, set)


def _contents(value: Any) -> Any:
    """A shallow copy of a plain container, which a forward may fill (caches); None for anything else."""
    return value.copy() if isinstance(value, _CONTAINERS) and hasattr(value, "copy") else None


def _put_back(value: Any, contents: Any) -> None:
    if isinstance(value, list):
        value[:] = contents
    else:
        value.clear()
        value.update(contents)


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
def untouched(model: nn.Module, *, tensors: bool) -> Iterator[None]:
    """Restores every module's attributes, tensors' places, flags and hooks, and all random generators.

    Args:
        model: The network; its modules may be changed in any way inside the block.
        tensors: Whether the contents of buffers are saved and restored too (needed where the forward runs on the
            real ones).
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    saved = [dict(vars(module)) for module in modules]
    inner = [{key: kept for key, value in state.items() if (kept := _contents(value)) is not None} for state in saved]
    contents = [(buffer, buffer.detach().clone()) for buffer in model.buffers()] if tensors else []
    try:
        with _random_state():
            yield
    finally:
        for module, state, kept in zip(modules, saved, inner, strict=True):
            for key, value in kept.items():
                _put_back(state[key], value)
            vars(module).clear()
            vars(module).update(state)
        with torch.no_grad():
            for buffer, value in contents:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

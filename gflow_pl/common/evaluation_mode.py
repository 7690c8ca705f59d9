"""Evaluation mode for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluation_mode"]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and restore the training flag of each of its submodules afterwards."""
    flags = {submodule: submodule.training for submodule in module.modules()}
    try:
        # Flag by flag: a module may override `train` (to keep a norm frozen, for instance), which would change others.
        for submodule in flags:
            submodule.training = False
        yield
    finally:
        for submodule, training in flags.items():
            submodule.training = training

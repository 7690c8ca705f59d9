"""Evaluation mode for the time of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

__all__ = ["evaluation_mode", "training_setter"]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and restore the training flag of each of its submodules afterwards.

    A module whose flag cannot be set keeps it.
    """
    flags = [(submodule.training, training_setter(submodule)) for submodule in module.modules()]
    try:
        # Flag by flag: a module may override `train` (to keep a norm frozen, for instance), which would change others.
        for _, set_flag in flags:
            set_flag(False)
        yield
    finally:
        for training, set_flag in flags:
            set_flag(training)


def training_setter(module: nn.Module) -> Callable[[bool], Any]:
    """Return a function that sets the training flag of a module and does not raise, whatever `module` overrides."""
    if not hasattr(type(module), "training") and not isinstance(module, torch.jit.ScriptModule):
        attributes = vars(module)
        return lambda flag: attributes.__setitem__("training", flag)

    def set_flag(flag: bool) -> None:
        with suppress(Exception):  # a property or a slot, which may refuse
            module.training = flag

    return set_flag

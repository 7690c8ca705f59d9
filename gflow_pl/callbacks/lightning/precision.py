"""The Trainer's precision: the default type of new tensors, and the scale of gradients under mixed precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from gflow_pl.callbacks.lightning.packages import attached_trainer, both_packages
from gflow_pl.common.lightning_package import pl
from gflow_pl.common.nested import copy_nested

__all__ = ["gradient_scale", "true_precision", "with_true_precision"]

_Batch = TypeVar("_Batch")
_Result = TypeVar("_Result")


@contextmanager
def true_precision(module: pl.LightningModule) -> Iterator[None]:
    """Create new tensors in the type of the Trainer's precision "64-true", "16-true" or "bf16-true", as training does.

    With other precisions, or without a Trainer, the block changes nothing.
    """
    trainer = attached_trainer(module)
    plugin = None if trainer is None else trainer.precision_plugin
    changes_default_type = isinstance(plugin, both_packages(pl.plugins.DoublePrecision, pl.plugins.HalfPrecision))
    with plugin.forward_context() if plugin is not None and changes_default_type else nullcontext():
        yield


def with_true_precision(
    function: Callable[[pl.LightningModule, _Batch], _Result],
) -> Callable[[pl.LightningModule, _Batch], _Result]:
    """Wrap a function of a module and a batch so that it runs in `true_precision`, on a copy of the batch."""

    @functools.wraps(function)
    def run(module: pl.LightningModule, batch: _Batch) -> _Result:
        with true_precision(module):
            return function(module, copy_nested(batch, Tensor.clone))

    return run


def gradient_scale(scaler: GradScaler | None, optimizer: Optimizer, device: torch.device) -> Tensor | None:
    """Return the factor by which an optimizer's gradients are still multiplied just before its step; None for 1.

    Args:
        scaler: The gradient scaler of mixed precision, if there is one.
        optimizer: The optimizer that is about to step.
        device: The device of the gradients.
    """
    # `_step_supports_amp_scaling` is a private attribute of torch's fused optimizers, which divide by the scale inside
    # their step; for all others Lightning has divided already. If torch renamed it, the gradients of fused optimizers
    # would be taken with the scale, up to 65536 times too large.
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    return scaler.scale(torch.ones((), device=device))

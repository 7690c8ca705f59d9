"""Feeds a `Tracker` with the gradients of the training's own steps."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from gflow_pl.importance import Tracker

__all__ = ["StepGradients", "TrackOrder", "in_window"]

TrackOrder = Literal["formula", "published"]


def in_window(trainer: pl.Trainer, batch_idx: int, track_batches: int) -> bool:
    """Whether a batch is of the last `track_batches` steps of its epoch; without a known length every batch is.

    Of a longer average only the last steps matter: with alpha 0.8 the one before the last twenty weighs 1e-14.
    """
    if trainer.num_training_batches == float("inf"):
        return True
    size = trainer.accumulate_grad_batches  # batches of a step; the last step of an epoch may have fewer
    return batch_idx // size >= math.ceil(trainer.num_training_batches / size) - track_batches


class StepGradients:
    """Takes the gradients of every tracked step: of the global batch, unscaled, before clipping.

    Args:
        tracker: What is fed.
        order: "formula": gradient and weights of the same step; "published": the weights after the step, as the
            published code has it.
    """

    def __init__(self, tracker: Tracker, order: TrackOrder) -> None:
        self.tracker, self._order = tracker, order
        self._names: list[str] | None = None
        self._kept: dict[str, Tensor] | None = None

    def before_step(
        self, module: pl.LightningModule, optimizer: Optimizer, batch: Any, *, may_overflow: bool = False
    ) -> None:
        """Looks at the gradients that an optimizer is about to use; accumulation, scaling and reduction are done.

        With `may_overflow` a step whose gradients are not finite is left out: the gradient scaler leaves it out too.
        """
        if self._names is None:
            self._names = self.tracker.names(module)
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        wanted = set(self._names)
        gradients = {
            name: p.grad
            for name, p in module.named_parameters()
            if name in wanted and id(p) in mine and p.grad is not None
        }
        if wanted and not gradients:
            return  # this optimizer holds nothing that is scored
        if may_overflow and not _are_finite(optimizer):
            return
        if self._order == "formula":
            self.tracker.update(module, gradients, batch=batch)
        else:
            # Clipping works in place, so the gradients are kept as they are now; several optimizers may step in a batch.
            kept = {name: gradient.detach().clone() for name, gradient in gradients.items()}
            self._kept = {**(self._kept or {}), **kept}

    def after_step(self, module: pl.LightningModule, batch: Any) -> None:
        """In the published order, takes in the step with the weights that it led to."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            self.tracker.update(module, kept, batch=batch)


def _are_finite(optimizer: Optimizer) -> bool:
    """Whether every gradient of an optimizer is finite, which is what a gradient scaler asks before it steps."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(bool(torch.isfinite(norm)) for norm in torch._foreach_norm(gradients)) if gradients else True

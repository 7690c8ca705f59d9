"""Feeds a `Tracker` with the gradients of the training's own steps."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

from gflow_pl.importance import Tracker

__all__ = ["StepGradients", "TrackOrder", "in_window"]

TrackOrder = Literal["formula", "published"]


def in_window(trainer: pl.Trainer, batch_idx: int, track_batches: int) -> bool:
    """Whether a batch is among the last `track_batches` steps of its epoch; without a known length every batch is.

    Of a longer average only the last steps matter: with alpha 0.8 the one before the last twenty weighs 1e-14.
    """
    steps = track_batches * trainer.accumulate_grad_batches
    return batch_idx >= trainer.num_training_batches - steps if trainer.num_training_batches != float("inf") else True


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
        self._kept: dict[str, Tensor | None] | None = None

    def before_step(self, module: pl.LightningModule, optimizer: Optimizer, batch: Any) -> None:
        """Looks at the gradients that an optimizer is about to use; accumulation, scaling and reduction are done."""
        if self._names is None:
            self._names = self.tracker.names(module)
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        wanted = set(self._names)
        gradients = {name: p.grad if id(p) in mine else None for name, p in module.named_parameters() if name in wanted}
        if self._order == "formula":
            self.tracker.update(module, gradients, batch=batch)
        else:
            # Clipping works in place, so the gradients are kept as they are now.
            self._kept = {name: None if g is None else g.detach().clone() for name, g in gradients.items()}

    def after_step(self, module: pl.LightningModule, batch: Any) -> None:
        """In the published order, takes in the step with the weights that it led to."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            self.tracker.update(module, kept, batch=batch)

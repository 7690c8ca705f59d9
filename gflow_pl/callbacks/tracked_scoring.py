"""Scores from the gradients of the training's own steps: feeds a `Tracker` with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from gflow_pl.callbacks.lightning.precision import gradient_scale
from gflow_pl.callbacks.lightning.ranks import mean_over_ranks
from gflow_pl.importance import Tracker
from gflow_pl.importance.derived_weights import DerivedWeightGradients
from gflow_pl.values import Scores

__all__ = ["StepGradients", "TrackOrder", "Tracking", "in_window"]

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
        reduce: Averages a tensor over the ranks; gradients of parameters are averaged already.
    """

    def __init__(self, tracker: Tracker, order: TrackOrder, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self.tracker, self._order, self._reduce = tracker, order, reduce
        self._names: list[str] | None = None
        self._computed: DerivedWeightGradients | None = None
        self._kept: dict[str, Tensor] | None = None

    def begin(self, module: pl.LightningModule) -> None:
        """Until `end`, a batch is trained on; without these two, weights that are computed have no gradients."""
        if self._computed is None:
            self._computed = DerivedWeightGradients(module, self._names_of(module))
        self._computed.start()

    def end(self) -> None:
        """The batch was trained on."""
        if self._computed is not None:
            self._computed.stop()

    def before_step(self, module: pl.LightningModule, optimizer: Optimizer, batch: Any, *, scaler: Any = None) -> None:
        """Looks at the gradients that an optimizer is about to use; accumulation and reduction are done.

        With a gradient scaler a step whose gradients are not finite is left out: the scaler leaves it out too.
        """
        wanted = set(self._names_of(module))
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gradients = {
            name: p.grad
            for name, p in module.named_parameters()
            if name in wanted and id(p) in mine and p.grad is not None
        }
        computed = {} if self._computed is None else self._computed.collect(mine, self._reduce)
        if wanted and not gradients and not computed:
            return  # this optimizer holds nothing that is scored
        if scaler is not None:
            if not _are_finite(optimizer):
                return
            scale = scaler.scale(torch.ones((), device=module.device))
            computed = {name: gradient / scale for name, gradient in computed.items()}
            if gradient_scale(scaler, optimizer, module.device) is not None:
                gradients = {name: gradient / scale for name, gradient in gradients.items()}
        gradients |= computed
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

    def _names_of(self, module: pl.LightningModule) -> list[str]:
        if self._names is None:
            self._names = self.tracker.names(module)
        return self._names


class Tracking:
    """The average over the last steps of the epoch in hand; it begins anew in every epoch.

    Args:
        num_steps: Steps at the end of each epoch that are tracked.
        order: As in `StepGradients`.
        new_tracker: Makes a `Tracker` for the module as it is now, on a batch of its training.
    """

    def __init__(
        self,
        num_steps: int,
        order: TrackOrder,
        new_tracker: Callable[[pl.Trainer, pl.LightningModule, Any], Tracker],
    ) -> None:
        self._num_steps, self._order, self._new_tracker = num_steps, order, new_tracker
        self._steps: StepGradients | None = None
        self._batch: Any = None
        self._epoch: int | None = None
        self._saved: dict[str, Tensor] | None = None
        self._told = False

    @property
    def is_in_a_step(self) -> bool:
        """Whether the batch in hand is of a step that is tracked."""
        return self._batch is not None

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the batch that is about to be trained on, if its step is to be tracked."""
        self.end()
        if not in_window(trainer, batch_idx, self._num_steps):
            return
        if self._epoch != trainer.current_epoch:
            self._steps, self._saved = None, None
        if self._steps is None:
            self._steps = self._begun_or_resumed(trainer, module, batch)
            self._epoch = trainer.current_epoch
        self._batch = (batch,)
        # Where the module decides over its steps, gradients may be thrown away without one.
        if module.automatic_optimization and not _decides_over_steps(module):
            self._steps.begin(module)

    def end(self) -> None:
        """Lets go of the batch."""
        self._batch = None
        if self._steps is not None:
            self._steps.end()

    def before_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Takes in the gradients that an optimizer is about to use."""
        assert self._steps is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._steps.before_step(module, optimizer, self._batch[0], scaler=scaler)

    def after_step(self, module: pl.LightningModule) -> None:
        """In the published order, takes in the weights after the step."""
        assert self._steps is not None
        self._steps.after_step(module, self._batch[0])

    def scores(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Scores | None:
        """The average, which ends with it; None, with a warning, if no step was tracked."""
        self.end()
        if self._saved is not None and self._steps is None:
            self._steps = self._begun_or_resumed(trainer, module, batch)
        steps, self._steps, self._saved = self._steps, None, None
        if steps is None or steps.tracker.num_updates == 0:
            rank_zero_warn(
                "PruningCallback: no step was tracked before this round, so it is scored by passes of its own."
            )
            return None
        return steps.tracker.scores()

    def state_dict(self) -> dict[str, Any]:
        """The average and the epoch that it is of."""
        return {"tracker": None if self._steps is None else self._steps.tracker.state_dict(), "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the average of a checkpoint."""
        self.end()
        self._steps, self._saved, self._epoch = None, state["tracker"], state["epoch"]

    def _begun_or_resumed(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> StepGradients:
        tracker = self._new_tracker(trainer, module, batch)
        # Every epoch has a new one, and every rank its own: one of them speaks.
        tracker.has_logged, self._told = self._told or trainer.global_rank > 0, True
        if self._saved is not None:
            tracker.load_state_dict({name: value.to(module.device) for name, value in self._saved.items()})
            self._saved = None
        return StepGradients(tracker, self._order, mean_over_ranks(trainer))


def _decides_over_steps(module: pl.LightningModule) -> bool:
    """Whether `optimizer_step` is the module's own."""
    return next(cls for cls in type(module).__mro__ if "optimizer_step" in vars(cls)).__name__ != "LightningModule"


def _are_finite(optimizer: Optimizer) -> bool:
    """Whether every gradient of an optimizer is finite, which is what a gradient scaler asks before it steps."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(bool(torch.isfinite(norm)) for norm in torch._foreach_norm(gradients)) if gradients else True

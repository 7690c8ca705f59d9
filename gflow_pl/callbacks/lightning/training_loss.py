"""The loss that scores are taken from: the module's own training step, run without leaving a trace."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from gflow_pl.callbacks.lightning.precision import true_precision, with_true_precision
from gflow_pl.callbacks.lightning.silence import without_side_effects
from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.importance.gradients import logits_and_labels

__all__ = [
    "batch_inputs",
    "default_logits",
    "is_classifier",
    "training_loss",
    "training_step_returns_loss",
]


@with_true_precision
def training_loss(module: pl.LightningModule, batch: Any) -> Tensor:
    """The scalar loss that the module's `training_step` returns for a batch.

    Raises:
        ValueError: The step returns no loss.
    """
    # As Lightning calls it: the index is left out where the step does not take it.
    arguments = (batch, 0) if _num_arguments(module) > 1 else (batch,)
    try:
        output = module.training_step(*arguments)
    except Exception as error:
        if not module.training:
            error.add_note(
                f"PruningCallback ran `training_step` of {type(module).__name__} in evaluation mode, to score filters: where that "
                "cannot work, give it a `loss_fn(module, batch)` that returns the scalar loss."
            )
        raise
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"`training_step` of {type(module).__name__} returned {type(output).__name__}, expected a loss: "
            "give the PruningCallback a `loss_fn(module, batch)` that returns the scalar loss."
        )
    return loss


def training_step_returns_loss(module: pl.LightningModule) -> bool:
    """Whether `training_step` can be asked for the loss of a batch: it does not optimize, nor fetch batches, by itself."""
    return module.automatic_optimization and "dataloader_iter" not in inspect.signature(module.training_step).parameters


def _num_arguments(module: pl.LightningModule) -> float:
    parameters = inspect.signature(module.training_step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return float("inf")
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


default_logits = with_true_precision(logits_and_labels)
"""Logits of ``module(batch[0])`` and the labels ``batch[1]``, in the Trainer's precision."""


def batch_inputs(batch: Any) -> Any:
    """What a module's `forward` is called with, for a batch of (inputs, targets) or of inputs alone."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) > 0 else batch


def is_classifier(module: pl.LightningModule, batch: Any) -> bool:
    """Whether `forward` of a batch's inputs gives logits (examples, classes), and the batch has a label for each."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        return False
    labels = batch[1]
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        return False
    try:
        with evaluation_mode(module), torch.no_grad(), without_side_effects(module), true_precision(module):
            logits = module(batch[0])
    except Exception:  # whatever a foreign forward raises on these inputs: then it gives no logits
        return False
    return isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(labels)

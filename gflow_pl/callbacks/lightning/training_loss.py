"""The module's own loss, logits and inputs of a batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gflow_pl.callbacks.lightning.precision import true_precision, with_true_precision
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.common.lightning_package import pl
from gflow_pl.common.nested import copy_nested
from gflow_pl.importance.gradients import logits_and_labels

__all__ = [
    "batch_inputs",
    "default_logits",
    "is_classifier",
    "run_training_step",
    "training_loss",
    "training_step_returns_loss",
]


@with_true_precision
def training_loss(module: pl.LightningModule, batch: object) -> Tensor:
    """Return the scalar loss that the module's `training_step` computes for a batch.

    Raises:
        SettingsError: The step returns no loss.
    """
    try:
        output = run_training_step(module, batch)
    except Exception as error:
        if not module.training:
            error.add_note(
                f"PruningCallback ran `training_step` of {type(module).__name__} in evaluation mode, to score filters. "
                "If the step does not support evaluation mode, give the callback a `loss_fn(module, batch)` that "
                "returns the scalar loss."
            )
        raise
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise SettingsError(
            f"`training_step` of {type(module).__name__} returned {type(output).__name__}, expected a loss: "
            "give the PruningCallback a `loss_fn(module, batch)` that returns the scalar loss."
        )
    return loss


def run_training_step(module: pl.LightningModule, batch: object) -> Any:
    """Return what `training_step` returns for a batch."""
    # Call the step like Lightning does, which leaves the batch index out if the step does not take it.
    arguments = (batch, 0) if _num_positional_arguments(module) > 1 else (batch,)
    return module.training_step(*arguments)


def training_step_returns_loss(module: pl.LightningModule) -> bool:
    """Return whether `training_step` can be called to compute the loss of a batch.

    It cannot under manual optimization, where the step also updates the weights, nor if it fetches batches itself.
    """
    parameters = inspect.signature(module.training_step).parameters
    return module.automatic_optimization and "dataloader_iter" not in parameters


def _num_positional_arguments(module: pl.LightningModule) -> float:
    """Return the number of positional arguments that `training_step` takes; infinity if it takes ``*args``."""
    parameters = inspect.signature(module.training_step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return math.inf
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


default_logits = with_true_precision(logits_and_labels)
"""Return logits ``module(batch[0])`` and labels ``batch[1]``, computed in the Trainer's precision."""


def batch_inputs(batch: object) -> Any:
    """Return the part of a batch that `forward` takes: the first item of a tuple or list, else the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) > 0 else batch


def is_classifier(module: pl.LightningModule, batch: object) -> bool:
    """Return whether a module is a classifier on batches like this one.

    The batch must be a pair of inputs and labels, with one integer label per example, and `forward` must return logits
    (examples, classes) for the inputs. This is found out by a forward pass, so call it within `without_side_effects`.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        return False
    labels = batch[1]
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        return False
    try:
        with evaluation_mode(module), torch.no_grad(), true_precision(module):
            logits = module(copy_nested(batch[0], Tensor.clone))
    except Exception:  # the module's own code may raise anything on inputs that it does not take
        return False
    return isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(labels)

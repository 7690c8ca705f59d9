"""The loss of a batch, and its gradients batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F

from gflow_pl.common.errors import SettingsError
from gflow_pl.common.nested import on_copies
from gflow_pl.importance.batches import Batch, batch_size, to_device
from gflow_pl.importance.layers import TensorRef
from gflow_pl.importance.scoring_mode import cached_weights

__all__ = [
    "LogitsFn",
    "LossFn",
    "accumulator_dtype",
    "batch_gradients",
    "graph_nodes",
    "logits_and_labels",
    "loss_function",
    "refuse_reentrant_checkpointing",
    "scalar_loss",
    "zeros_for_missing",
]

LossFn = Callable[[Any, Any], Tensor]
"""``loss_fn(model, batch)`` returns the scalar mean loss of the batch."""

LogitsFn = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""``logits_fn(model, batch)`` returns the logits (examples, classes) and the labels (examples,) of the batch."""


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums over batches: float64 for a float64 tensor, float32 for any other."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def logits_and_labels(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits ``model(batch[0])`` and the labels ``batch[1]``.

    Raises:
        SettingsError: The batch is not a pair of inputs and targets.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise SettingsError(
            f"score_filters: a batch must be (inputs, targets), got {type(batch).__name__}; "
            "for other batches give `loss_fn(model, batch)`, which returns the scalar mean loss."
        )
    return model(batch[0]), batch[1]


def loss_function(loss_fn: LossFn | None, logits_fn: LogitsFn | None, temperature: float) -> LossFn:
    """Return the loss that filters are scored by.

    Args:
        loss_fn: Loss of the caller.
        logits_fn: Without a `loss_fn`: gives logits and labels; None for `logits_and_labels`.
        temperature: Without a `loss_fn`: divisor of the logits.

    Returns:
        `loss_fn`, or the mean cross-entropy of ``logits / temperature``. It is called with copies of batches.
    """
    if loss_fn is not None:
        return on_copies(loss_fn)
    logits_of = logits_fn or logits_and_labels

    def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
        logits, labels = logits_of(model, batch)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return F.cross_entropy(logits / temperature, labels)

    return on_copies(cross_entropy)


def scalar_loss(loss: LossFn, model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a batch as a tensor of shape ().

    Raises:
        SettingsError: The loss is not one number, or has no autograd graph.
    """
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise SettingsError(f"score_filters: the loss must be one number, the mean over the batch, got {got}.")
    if not value.requires_grad:
        raise SettingsError(
            "score_filters: the loss has no gradient; it must be computed from the model's outputs without detach()."
        )
    return value.reshape(())


def batch_gradients(
    model: nn.Module, refs: list[TensorRef], batches: Iterable[Batch], loss: LossFn, device: torch.device
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield the number of examples of every batch and the gradients of its mean loss.

    Args:
        model: The model, in `scoring_mode`.
        refs: Tensors to differentiate with respect to. One that the loss does not depend on has a gradient of zeros.
        batches: Batches, moved to the device one at a time.
        loss: Mean loss of a batch.
        device: Device of the model.

    Raises:
        SettingsError: The loss depends on none of the tensors, or cannot be differentiated.
    """
    for number, batch in enumerate(batches):
        examples = to_device(batch, device)
        with cached_weights(model):
            value = scalar_loss(loss, model, examples)
            if number == 0:
                refuse_reentrant_checkpointing(value)
            tensors = [ref.value for ref in refs]
            gradients = torch.autograd.grad(value, tensors, allow_unused=True)
        yield batch_size(batch), zeros_for_missing(tensors, gradients)


def zeros_for_missing(tensors: list[Tensor], gradients: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Return gradients in which None, for a tensor that the loss does not depend on, is replaced by zeros.

    Raises:
        SettingsError: All gradients are None.
    """
    if all(gradient is None for gradient in gradients):
        raise SettingsError("score_filters: the loss depends on none of the model's conv, linear or norm weights.")
    return [
        torch.zeros_like(tensor) if gradient is None else gradient.detach()
        for tensor, gradient in zip(tensors, gradients, strict=True)
    ]


def graph_nodes(*tensors: Tensor) -> Iterator[Node]:
    """Yield every node of the autograd graph of some tensors, once."""
    stack: list[Node | None] = [tensor.grad_fn for tensor in tensors]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def refuse_reentrant_checkpointing(loss: Tensor) -> None:
    """Raise if the model uses reentrant activation checkpointing, which `torch.autograd.grad` does not support.

    Raises:
        SettingsError: The autograd graph of the loss contains a reentrant checkpoint.
    """
    if any("CheckpointFunction" in node.name() for node in graph_nodes(loss)):
        raise SettingsError(
            "score_filters: the model uses reentrant activation checkpointing, whose gradients cannot be computed "
            "separately; call torch.utils.checkpoint with use_reentrant=False."
        )

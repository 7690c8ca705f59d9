"""First-order passes: the mean gradient of a batch, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gflow_pl.importance.batches import batch_size, to_device
from gflow_pl.importance.layers import TensorRef
from gflow_pl.importance.scoring_mode import cached_weights

__all__ = ["LogitsFn", "LossFn", "accumulator_dtype", "batch_gradients", "logits_and_labels", "loss_function"]

LossFn = Callable[[Any, Any], Tensor]
LogitsFn = Callable[[Any, Any], tuple[Tensor, Tensor]]


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """Sums are kept in float32; in float64 where the tensor is float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def logits_and_labels(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits and targets of an (inputs, targets) batch.

    Raises:
        ValueError: The batch is no such pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(
            f"score_filters: a batch must be (inputs, targets), got {type(batch).__name__}; "
            "for other batches give `loss_fn(model, batch)`, which returns the scalar mean loss."
        )
    return model(batch[0]), batch[1]


def loss_function(loss_fn: LossFn | None, logits_fn: LogitsFn | None, temperature: float) -> LossFn:
    """``loss_fn`` as it is, or the mean cross-entropy of logits / temperature."""
    if loss_fn is not None:
        return loss_fn
    logits_of = logits_fn or logits_and_labels

    def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
        logits, targets = logits_of(model, batch)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return F.cross_entropy(logits / temperature, targets)

    return cross_entropy


def scalar_loss(loss: LossFn, model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch, checked.

    Raises:
        ValueError: It is no scalar tensor, or no weight stands behind it.
    """
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"score_filters: the loss must be one number, the mean over the batch, got {got}.")
    if not value.requires_grad:
        raise ValueError(
            "score_filters: the loss has no gradient; it must be computed from the model's outputs without detach()."
        )
    return value.reshape(())


def batch_gradients(
    model: nn.Module, refs: list[TensorRef], batches: Iterable[Any], loss: LossFn, device: torch.device
) -> Iterator[tuple[int, list[Tensor]]]:
    """For every batch, its number of examples and the gradients of its mean loss with respect to `refs`.

    A tensor that the loss does not depend on has the gradient zero.

    Raises:
        ValueError: The loss depends on none of them.
    """
    for number, batch in enumerate(batches):
        examples = to_device(batch, device)
        with cached_weights(model):
            value = scalar_loss(loss, model, examples)
            if number == 0:
                refuse_reentrant(value)
            tensors = [ref.value for ref in refs]
            gradients = torch.autograd.grad(value, tensors, allow_unused=True)
        yield batch_size(batch), without_gaps(tensors, gradients)


def without_gaps(tensors: list[Tensor], gradients: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Zeros for the tensors that the loss does not depend on.

    Raises:
        ValueError: That is all of them.
    """
    if all(gradient is None for gradient in gradients):
        raise ValueError("score_filters: the loss depends on none of the model's conv, linear or norm weights.")
    return [
        torch.zeros_like(tensor) if gradient is None else gradient.detach()
        for tensor, gradient in zip(tensors, gradients, strict=True)
    ]


def graph_nodes(*tensors: Tensor) -> Iterator[Any]:
    """Every node of the autograd graph behind some tensors, once."""
    stack: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def refuse_reentrant(loss: Tensor) -> None:
    """Refuse activation checkpointing of the kind that `torch.autograd.grad` cannot pass.

    Raises:
        ValueError: The graph holds a reentrant checkpoint.
    """
    if any("CheckpointFunction" in node.name() for node in graph_nodes(loss)):
        raise ValueError(
            "score_filters: the model uses reentrant activation checkpointing, whose gradients cannot be taken apart; "
            "call torch.utils.checkpoint with use_reentrant=False."
        )

"""Two exact strategies for Hessian-gradient products, and the choice between them.

Reverse over forward differentiates the rate of change of the loss along the gradient; double backward differentiates
the gradient. The first takes 0.8 of the time of the second on a CPU and half of it on a GPU
(docs/benchmarks_importance.md, docs/benchmarks_gpu.md), but is correct only if the forward derivative of every operator
is itself differentiable, which PyTorch does not promise. It is therefore used only if all operators of the loss are on
a list that the tests verify.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gflow_pl.common.errors import SettingsError
from gflow_pl.importance.batches import Batch
from gflow_pl.importance.gradients import (
    LossFn,
    graph_nodes,
    refuse_reentrant_checkpointing,
    scalar_loss,
    zeros_for_missing,
)
from gflow_pl.importance.layers import TensorRef
from gflow_pl.importance.loss_operators import custom_functions, loss_and_operators
from gflow_pl.importance.scoring_mode import cached_weights

__all__ = [
    "FORWARD_DIFFERENTIABLE_TWICE",
    "STRATEGIES",
    "Strategy",
    "choose_strategy",
    "hessian_vector_product",
    "possible_strategies",
]

log = logging.getLogger(__name__)

Strategy = Literal["reverse_over_forward", "double_backward"]

FORWARD_DIFFERENTIABLE_TWICE = frozenset({
    "torch::autograd::AccumulateGrad", "Convolution", "Addmm", "Mm", "T", "NativeBatchNorm", "NativeGroupNorm", "Relu",
    "Hardtanh", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish", "Hardswish", "Sigmoid", "Tanh", "Softplus", "Softmax",
    "Add", "Sub", "Mul", "Div", "Neg", "Pow", "Exp", "Abs", "Sum", "Mean", "MaxPool2DWithIndices", "AvgPool2D",
    "AdaptiveAvgPool2D", "UpsampleNearest2D", "UpsampleBilinear2D", "ConstantPadNd", "View", "UnsafeView",
    "ReshapeAlias", "Unsqueeze", "Squeeze", "Transpose", "Permute", "Expand", "Slice", "Select", "Split", "Cat",
    "Stack", "Clone", "Index", "IndexSelect", "IndexCopy", "LogSoftmax", "NllLoss", "MseLoss",
})  # fmt: skip
"""Operators whose forward derivative is itself differentiable, each verified by a test. Others may give a wrong product
without an error: the forward derivative of a layer norm, for instance, treats mean and variance as constants."""


def possible_strategies(refs: Sequence[TensorRef], operators: Collection[str]) -> tuple[Strategy, ...]:
    """Return the strategies that a loss allows, the fastest first.

    For a layer whose gradient costs 3 convolutions, reverse over forward costs 8 and double backward 9.

    Args:
        refs: Tensors that gradient flow moves. Reverse over forward replaces them, so all must be parameters.
        operators: Operators that the loss is computed with, see `loss_and_operators`.
    """
    if FORWARD_DIFFERENTIABLE_TWICE.issuperset(operators) and all(isinstance(ref.value, nn.Parameter) for ref in refs):
        return ("reverse_over_forward", "double_backward")
    return ("double_backward",)


def choose_strategy(
    model: nn.Module,
    refs: list[TensorRef],
    scored: list[int],
    batch: Batch,
    loss: LossFn,
    strategy: Strategy | None = None,
) -> tuple[Strategy, frozenset[str]]:
    """Choose the strategy for all batches that are computed with the same operators as this one.

    The strategies that are possible with the operators of the loss are tried on the batch, the fastest one first. If it
    fails, the reason is logged and the next one is tried.

    Args:
        model: The model, in `scoring_mode`.
        refs: Tensors with respect to which the loss is differentiated: all parameters that training changes.
        scored: Positions in `refs` of the tensors for which Hessian-gradient products are needed.
        batch: A few examples on the model's device.
        loss: Mean loss of a batch.
        strategy: The only strategy to try; None for `possible_strategies`.

    Returns:
        The strategy, and the operators of the batch.

    Raises:
        SettingsError: The model has no second derivatives. The message names the operator.
    """
    # The trial multiplies the Hessian by the gradient of this batch.
    with cached_weights(model):
        value, operators = loss_and_operators(loss, model, batch)
        refuse_reentrant_checkpointing(value)
        custom = custom_functions(value)
        tensors = [ref.value for ref in refs]
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    direction = zeros_for_missing(tensors, gradients)

    errors: list[str] = []
    for candidate in possible_strategies(refs, operators) if strategy is None else (strategy,):
        try:
            # The product comes first: its error names the operator.
            STRATEGIES[candidate](model, refs, scored, direction, batch, loss)
            if candidate == "reverse_over_forward":
                _verify_reverse_over_forward(model, refs, direction, batch, loss, gradients)
            else:
                _verify_double_backward(model, refs, batch, loss)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # The forward and backward passes have succeeded above, so the second derivative is what fails.
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            errors.append(f"{candidate.replace('_', ' ')}: {reason}")
            continue
        if errors:
            log.info("Hessian-gradient products by %s, because of %s", candidate.replace("_", " "), "; ".join(errors))
        return candidate, operators

    named = f" (custom functions in the graph: {', '.join(custom)})" if custom else ""
    raise SettingsError(
        f"score_filters: this measure needs second derivatives, which the model does not have{named}: "
        f"{'; '.join(errors)}"
    )


def hessian_vector_product(
    gradients: Sequence[Tensor | None], vector: Sequence[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Return the rows of H v that belong to `tensors`, from gradients taken with ``create_graph=True``.

    Args:
        gradients: Gradient of a scalar loss with respect to every tensor that v moves; None where the loss does not
            depend on it.
        vector: v, one tensor for each of `gradients` and of its shape.
        tensors: Tensors in the graph of the loss.

    Returns:
        One product for each of `tensors`, without a graph; zeros where the gradients do not depend on the tensor.
    """
    # A gradient without a graph is constant and contributes nothing.
    pairs = [
        (gradient, part)
        for gradient, part in zip(gradients, vector, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(tensor, requires_grad=False) for tensor in tensors]
    products = torch.autograd.grad(
        [gradient for gradient, _ in pairs],
        list(tensors),
        grad_outputs=[part.to(gradient.dtype) for gradient, part in pairs],
        allow_unused=True,
    )
    return [
        torch.zeros_like(tensor, requires_grad=False) if product is None else product.detach()
        for tensor, product in zip(tensors, products, strict=True)
    ]


def _double_backward(
    model: nn.Module, refs: list[TensorRef], scored: list[int], direction: list[Tensor], batch: Batch, loss: LossFn
) -> list[Tensor]:
    """Return H v for the scored tensors, by differentiating the gradient."""
    with cached_weights(model):
        value = scalar_loss(loss, model, batch)
        tensors = [ref.value for ref in refs]
        gradients = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
        return hessian_vector_product(gradients, direction, [tensors[i] for i in scored])


def _verify_double_backward(model: nn.Module, refs: list[TensorRef], batch: Batch, loss: LossFn) -> None:
    """Raise if the gradients contain a node that cannot be differentiated.

    `torch.autograd.grad` visits only the nodes on the way to its inputs. It would skip the others, and the product
    would be wrong without an error.
    """
    with cached_weights(model):
        value = scalar_loss(loss, model, batch)
        gradients = torch.autograd.grad(value, [ref.value for ref in refs], create_graph=True, allow_unused=True)
    _verify_differentiable(*(gradient for gradient in gradients if gradient is not None))


def _reverse_over_forward(
    model: nn.Module, refs: list[TensorRef], scored: list[int], direction: list[Tensor], batch: Batch, loss: LossFn
) -> list[Tensor]:
    """Return H v for the scored tensors, by differentiating the rate of change of the loss along v."""
    _, rate, weights = _rate_of_loss(model, refs, direction, batch, loss)
    asked = [weights[i] for i in scored]
    if not rate.requires_grad:  # the rate does not depend on the weights: the loss has no curvature
        return [torch.zeros_like(tensor, requires_grad=False) for tensor in asked]
    products = torch.autograd.grad(rate, asked, allow_unused=True)
    return [
        torch.zeros_like(tensor, requires_grad=False) if product is None else product
        for tensor, product in zip(asked, products, strict=True)
    ]


def _verify_reverse_over_forward(
    model: nn.Module,
    refs: list[TensorRef],
    direction: list[Tensor],
    batch: Batch,
    loss: LossFn,
    gradients: tuple[Tensor | None, ...],
) -> None:
    """Raise if the rate cannot be differentiated, or if the replaced weights do not reach the loss.

    Some modules, such as recurrent ones, keep their weights in a separate list, where they cannot be replaced.

    Args:
        model: The model.
        refs: Tensors that gradient flow moves.
        direction: Direction of the rate.
        batch: A few examples.
        loss: Mean loss of a batch.
        gradients: Gradients of `refs` without replacement; None for a tensor that the loss does not depend on.
    """
    value, rate, weights = _rate_of_loss(model, refs, direction, batch, loss)
    reached = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
    for ref, gradient, expected in zip(refs, reached, gradients, strict=True):
        if (gradient is None) != (expected is None):
            raise RuntimeError(f"dual numbers do not reach the weight '{ref.name}'")
    _verify_differentiable(rate)


def _verify_differentiable(*tensors: Tensor) -> None:
    """Raise if the graph of the tensors contains a node that raises when it is differentiated."""
    if any(node.name().split("::")[-1] in ("Error", "NotImplemented") for node in graph_nodes(*tensors)):
        raise RuntimeError("a function in the graph can be differentiated only once")


def _rate_of_loss(
    model: nn.Module, refs: list[TensorRef], direction: list[Tensor], batch: Batch, loss: LossFn
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the loss, its rate of change along a direction, and the weights that both are functions of."""
    leaves = [ref.value.detach().requires_grad_(True) for ref in refs]

    def value(*weights: Tensor) -> Tensor:
        return _call_with_weights(model, refs, weights, loss, batch).reshape(())

    # Bare dual numbers would not do: softmax and its relatives then overwrite what their second pass needs.
    found = torch.func.jvp(value, tuple(leaves), tuple(direction))
    return found[0], found[1], leaves


class _LossModule(nn.Module):
    """A module that computes the loss of a model, for `torch.func.functional_call`."""

    def __init__(self, model: nn.Module, loss: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.training = False

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.model, batch)


def _call_with_weights(
    model: nn.Module, refs: list[TensorRef], weights: Sequence[Tensor], loss: LossFn, batch: Batch
) -> Tensor:
    """Return the loss of a batch with other weights in the model."""
    replaced = {id(ref.value): weight for ref, weight in zip(refs, weights, strict=True)}
    module = _LossModule(model, loss)
    # Every place is named once, including those of tied weights: otherwise a module with two names would not get its
    # former weight back.
    named = {
        f"{name}.{attribute}": replaced[id(parameter)]
        for name, submodule in module.named_modules()
        for attribute, parameter in submodule._parameters.items()
        if id(parameter) in replaced
    }
    return torch.func.functional_call(module, named, (batch,), tie_weights=False)


_Product = Callable[[nn.Module, list[TensorRef], list[int], list[Tensor], Any, LossFn], list[Tensor]]

STRATEGIES: dict[Strategy, _Product] = {
    "reverse_over_forward": _reverse_over_forward,
    "double_backward": _double_backward,
}
"""Functions (model, refs, scored, direction, batch, loss) that return H v for the scored tensors."""

"""Three exact ways to a Hessian-gradient product, and the rule that chooses one by facts of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from gflow_pl.importance.gradients import LossFn, graph_nodes, refuse_reentrant, scalar_loss, without_gaps
from gflow_pl.importance.layers import TensorRef
from gflow_pl.importance.scoring_mode import cached_weights

__all__ = ["WAYS", "Way", "choose_way", "facts_of", "hessian_vector_product", "watched_loss"]

log = logging.getLogger(__name__)

Way = Literal["reverse_over_forward", "forward_over_reverse", "double_backward"]
_Gradients = tuple[Tensor | None, ...]
_Product = Callable[[nn.Module, list[TensorRef], list[int], list[Tensor], Any, LossFn], list[Tensor]]

# Operators whose forward derivative is itself differentiable, each shown by a test. Others may not be, and say nothing:
# that of a layer norm, or of a batch norm with the statistics of its batch, holds mean and variance fixed.
_FORWARD_TWICE = frozenset({
    "torch::autograd::AccumulateGrad", "Convolution", "Addmm", "Mm", "T", "NativeBatchNorm", "NativeGroupNorm",
    "Relu", "Hardtanh", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish", "Hardswish", "Sigmoid", "Tanh", "Softplus", "Softmax",
    "Add", "Sub", "Mul", "Div", "Neg", "Pow", "Exp", "Abs", "Sum", "Mean", "MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D",
    "UpsampleNearest2D", "UpsampleBilinear2D", "ConstantPadNd", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Transpose",
    "Permute", "Expand", "Slice", "Select", "Split", "Cat", "Stack", "Clone", "Index", "IndexSelect", "IndexCopy",
    "LogSoftmax", "NllLoss", "MseLoss",
})  # fmt: skip


# Facts of a loss besides the operators in its graph; none of them is the name of an operator.
_OUTSIDE = "something computed outside of the graph"
_OWN_STATISTICS = "a batch norm with the statistics of its batch"


def facts_of(value: Tensor) -> tuple[str, ...]:
    """What a loss is computed by, as its graph shows it: the facts that decide which ways are open."""
    return tuple(map(_fact, graph_nodes(value)))


def _fact(node: Any) -> str:
    operator = node.name().split("Backward")[0]
    if _is_custom(node):
        return f"custom function {operator}"
    if operator in ("NativeBatchNorm", "CudnnBatchNorm"):  # with the running statistics their derivatives are the same
        return _OWN_STATISTICS if node._saved_training else "NativeBatchNorm"
    return operator


def watched_loss(model: nn.Module, batch: Any, loss: LossFn) -> tuple[Tensor, tuple[str, ...]]:
    """The loss of a batch and all its facts, also what its graph does not show."""
    with cached_weights(model), _Stops() as stops:
        value = scalar_loss(loss, model, batch)
    facts = facts_of(value)
    return value, (*facts, _OUTSIDE) if stops.seen else facts


def possible_ways(refs: list[TensorRef], facts: Collection[str]) -> tuple[Way, ...]:
    """The ways by facts of the model, the cheapest first; figures in docs/benchmarks_importance.md.

    Of a layer whose gradient costs 3 convolutions, H g costs 8 by reverse over forward, the gradient of the loss's rate
    of change along g, and 9 by each of the others. The first is taken where every operator is known to allow it. A weight
    that a parametrization computes has no place where a dual number could be put, and dual numbers do not stop where a
    forward computes something outside of the graph, by ``torch.no_grad()`` or ``.data``: there only the last is left.
    """
    if _OUTSIDE in facts or not all(isinstance(ref.value, nn.Parameter) for ref in refs):
        return ("double_backward",)
    if _FORWARD_TWICE.issuperset(facts):
        return ("reverse_over_forward", "forward_over_reverse", "double_backward")
    return ("forward_over_reverse", "double_backward")


def _double_backward(
    model: nn.Module, refs: list[TensorRef], scored: list[int], direction: list[Tensor], batch: Any, loss: LossFn
) -> list[Tensor]:
    with cached_weights(model):
        value = scalar_loss(loss, model, batch)
        tensors = [ref.value for ref in refs]
        gradients = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
        return hessian_vector_product(gradients, direction, [tensors[i] for i in scored])


def hessian_vector_product(
    gradients: Sequence[Tensor | None], vector: Sequence[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Return the rows of H v that belong to `tensors`, from gradients taken with ``create_graph=True``.

    Args:
        gradients: Gradient of a scalar loss with respect to every tensor that v moves; None where the loss does not depend on it.
        vector: v, one tensor for each of `gradients` and of its shape.
        tensors: Tensors in the graph of the loss.

    Returns:
        One product for each of `tensors`, without a graph; zeros where the gradients do not depend on the tensor.
    """
    # A gradient without a graph is constant: it adds nothing.
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


class _Bound(nn.Module):
    """A model and something to compute from it as one module, so that weights can be lent to it for that call."""

    def __init__(self, model: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.compute = compute
        # Without this the training flag of the wrapper would be the only one that is on.
        self.training = False

    def forward(self, *args: Any) -> Any:
        return self.compute(self.model, *args)


def _with_weights(
    model: nn.Module, refs: list[TensorRef], weights: Sequence[Tensor], compute: Callable[..., Any], *args: Any
) -> Any:
    """``compute(model, *args)`` while other weights stand in the model."""
    lent = {id(ref.value): weight for ref, weight in zip(refs, weights, strict=True)}
    bound = _Bound(model, compute)
    # Each place once, tied ones included: a module that stands under two names would else not get its own weight back.
    named = {
        f"{name}.{attribute}": lent[id(parameter)]
        for name, module in bound.named_modules()
        for attribute, parameter in module._parameters.items()
        if id(parameter) in lent
    }
    return torch.func.functional_call(bound, named, args, tie_weights=False)


def _rate_of_loss(
    model: nn.Module, refs: list[TensorRef], direction: list[Tensor], batch: Any, loss: LossFn
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss, its rate of change along the direction, and the weights that both are functions of."""
    leaves = [ref.value.detach().requires_grad_(True) for ref in refs]

    def value(*weights: Tensor) -> Tensor:
        return _with_weights(model, refs, weights, loss, batch).reshape(())

    # Not by bare dual numbers: softmax and its kin then write over what their second pass needs.
    found = torch.func.jvp(value, tuple(leaves), tuple(direction))
    return found[0], found[1], leaves


def _reverse_over_forward(
    model: nn.Module, refs: list[TensorRef], scored: list[int], direction: list[Tensor], batch: Any, loss: LossFn
) -> list[Tensor]:
    _, rate, leaves = _rate_of_loss(model, refs, direction, batch, loss)
    asked = [leaves[i] for i in scored]
    # A rate without a graph does not depend on the weights: the loss has no curvature.
    products = torch.autograd.grad(rate, asked, allow_unused=True) if rate.requires_grad else [None] * len(asked)
    return [
        torch.zeros_like(tensor, requires_grad=False) if product is None else product
        for tensor, product in zip(asked, products, strict=True)
    ]


def _forward_over_reverse(
    model: nn.Module, refs: list[TensorRef], scored: list[int], direction: list[Tensor], batch: Any, loss: LossFn
) -> list[Tensor]:
    with forward_ad.dual_level():
        gradients, asked = _dual_gradients(model, refs, scored, direction, batch, loss)
        products = []
        for gradient, tensor in zip(gradients, asked, strict=True):
            tangent = None if gradient is None else forward_ad.unpack_dual(gradient).tangent
            products.append(torch.zeros_like(tensor) if tangent is None else tangent.detach())
    return products


def _dual_gradients(
    model: nn.Module, refs: list[TensorRef], scored: list[int], direction: list[Tensor], batch: Any, loss: LossFn
) -> tuple[_Gradients, list[Tensor]]:
    """Gradients at the weights plus a dual step along the direction; their tangents are the products."""
    leaves = [ref.value.detach().requires_grad_(True) for ref in refs]
    duals = [forward_ad.make_dual(leaf, along) for leaf, along in zip(leaves, direction, strict=True)]
    asked = [duals[i] for i in scored]

    def gradients(model: nn.Module) -> _Gradients:
        return torch.autograd.grad(scalar_loss(loss, model, batch), asked, allow_unused=True)

    return _with_weights(model, refs, duals, gradients), [leaves[i] for i in scored]


WAYS: dict[Way, _Product] = {
    "reverse_over_forward": _reverse_over_forward,
    "forward_over_reverse": _forward_over_reverse,
    "double_backward": _double_backward,
}


_READS_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class _Stops(TorchFunctionMode):
    """Sees whether anything is computed while no graph is made, or read out of it as ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or not torch.is_grad_enabled() or func == _READS_DATA
        return func(*args, **(kwargs or {}))


def choose_way(
    model: nn.Module,
    refs: list[TensorRef],
    scored: list[int],
    batch: Any,
    loss: LossFn,
    prefer: Way | None = None,
) -> tuple[Way, tuple[str, ...]]:
    """The way to take for all batches that are computed by the same operators as this one, which it is tried on.

    Args:
        model: The model, in evaluation mode.
        refs: What gradient flow moves.
        scored: Positions in `refs` of the tensors whose products are asked for.
        batch: Some examples on the model's device.
        loss: The mean loss of a batch.
        prefer: The way to try first; None: the order of `possible_ways`.

    Returns:
        The way, and the facts of the batch.

    Raises:
        ValueError: The model can be differentiated twice by no way; the message names the operator.
    """
    with cached_weights(model):
        value, facts = watched_loss(model, batch, loss)
        refuse_reentrant(value)
        ways = possible_ways(refs, facts)
        custom = sorted({type(node).__name__ for node in graph_nodes(value) if _is_custom(node)})
        tensors = [ref.value for ref in refs]
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    direction = [gradient.detach() for gradient in without_gaps(tensors, gradients)]
    if _OUTSIDE in facts:
        log.info(
            "Hessian-gradient products by double backward, since the forward computes something outside of the graph"
        )
    errors: list[str] = []
    for way in sorted(ways, key=lambda way: way != prefer):
        try:
            _TRIALS[way](model, refs, direction, batch, loss, gradients)
            WAYS[way](model, refs, scored, direction, batch, loss)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # The model itself has run above: whatever it is that fails now, this way is not open.
            errors.append(f"{way.replace('_', ' ')}: {(str(error).strip() or repr(error)).splitlines()[0]}")
            continue
        if errors:
            log.info("Hessian-gradient products by %s, since %s", way.replace("_", " "), "; ".join(errors))
        return way, facts
    named = f" (custom functions in the graph: {', '.join(custom)})" if custom else ""
    raise ValueError(
        f"score_filters: this measure needs second derivatives, which the model does not have{named}: {'; '.join(errors)}"
    )


def _is_custom(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _try_double_backward(
    model: nn.Module, refs: list[TensorRef], direction: list[Tensor], batch: Any, loss: LossFn, plain: _Gradients
) -> None:
    """Some functions end the graph of their gradients in an error that is met only on the way to nobody's input.

    `torch.autograd.grad` walks to its inputs alone and would pass by: the product would be wrong without a word.
    """
    with cached_weights(model):
        value = scalar_loss(loss, model, batch)
        gradients = torch.autograd.grad(value, [ref.value for ref in refs], create_graph=True, allow_unused=True)
    _check_no_end(*(gradient for gradient in gradients if gradient is not None))


def _try_forward_over_reverse(
    model: nn.Module, refs: list[TensorRef], direction: list[Tensor], batch: Any, loss: LossFn, plain: _Gradients
) -> None:
    with forward_ad.dual_level():
        gradients, _ = _dual_gradients(model, refs, list(range(len(refs))), direction, batch, loss)
    _check_reached(refs, gradients, plain)


def _try_reverse_over_forward(
    model: nn.Module, refs: list[TensorRef], direction: list[Tensor], batch: Any, loss: LossFn, plain: _Gradients
) -> None:
    value, rate, leaves = _rate_of_loss(model, refs, direction, batch, loss)
    _check_reached(refs, torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True), plain)
    _check_no_end(rate)


_TRIALS: dict[Way, Callable[..., None]] = {
    "reverse_over_forward": _try_reverse_over_forward,
    "forward_over_reverse": _try_forward_over_reverse,
    "double_backward": _try_double_backward,
}


def _check_no_end(*tensors: Tensor) -> None:
    if any(node.name().split("::")[-1] in ("Error", "NotImplemented") for node in graph_nodes(*tensors)):
        raise RuntimeError("a function in the graph can be differentiated only once")


def _check_reached(refs: list[TensorRef], gradients: _Gradients, plain: _Gradients) -> None:
    """Some modules keep their weights in a list of their own (recurrent ones), where no dual number reaches them."""
    for ref, gradient, expected in zip(refs, gradients, plain, strict=True):
        if (gradient is None) != (expected is None):
            raise RuntimeError(f"dual numbers do not reach the weight '{ref.name}'")

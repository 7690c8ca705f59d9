"""Hessian-gradient products, exact, in batches of any size, by one of two ways that agree to rounding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from gflow_pl.importance.batches import batch_size, map_tensors
from gflow_pl.importance.evaluation import one_weight_a_pass
from gflow_pl.importance.gradients import (
    LossFn,
    accumulator_dtype,
    batch_gradients,
    graph_nodes,
    refuse_reentrant,
    scalar_loss,
    without_gaps,
)
from gflow_pl.importance.layers import ScoredLayer, TensorRef
from gflow_pl.importance.ranks import Ranks

__all__ = ["HessianProducts", "Way", "choose_way", "flow_tensors", "second_order_kernels"]

log = logging.getLogger(__name__)

Way = Literal["forward_over_reverse", "double_backward"]
_Product = Callable[[nn.Module, list[TensorRef], list[int], list[Tensor], Any, LossFn], list[Tensor]]


@contextmanager
def second_order_kernels() -> Iterator[None]:
    """Only kernels with second derivatives: plain attention, nothing compiled."""
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        yield


def flow_tensors(model: nn.Module, layers: list[ScoredLayer]) -> list[TensorRef]:
    """The tensors that gradient flow moves: every floating parameter, once.

    Where a layer's weight is computed from others (a parametrization), the weight stands for them.
    """
    refs: list[TensorRef] = []
    computed: list[str] = []
    for layer in layers:
        if not isinstance(layer.module.weight, nn.Parameter):
            refs.append(layer.tensors("weight")[0])
            own = f"{layer.name}." if layer.name else ""
            computed += [f"{own}parametrizations.weight.", f"{own}weight_g", f"{own}weight_v", f"{own}weight_orig"]
    seen: set[int] = set()
    for owner_name, owner in model.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{attribute}" if owner_name else attribute
            if id(parameter) in seen or not parameter.is_floating_point() or name.startswith(tuple(computed)):
                continue
            seen.add(id(parameter))
            refs.append(TensorRef(owner, attribute, name))
    return refs


def preferred_way(refs: list[TensorRef]) -> Way:
    """The faster way, by facts of the model; figures in docs/benchmarks_importance.md.

    Forward over reverse; but a weight that a parametrization computes has no place where a dual number could be put,
    so there it is double backward.
    """
    plain = all(isinstance(ref.value, nn.Parameter) for ref in refs)
    return "forward_over_reverse" if plain else "double_backward"


def _double_backward(
    model: nn.Module, refs: list[TensorRef], scored: list[int], direction: list[Tensor], batch: Any, loss: LossFn
) -> list[Tensor]:
    with one_weight_a_pass():
        value = scalar_loss(loss, model, batch)
        tensors = [ref.value for ref in refs]
        gradients = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
        # A gradient without a graph of its own does not depend on the weights: it adds nothing.
        pairs = [
            (gradient, along)
            for gradient, along in zip(gradients, direction, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        asked = [tensors[i] for i in scored]
        if not pairs:
            return [torch.zeros_like(tensor) for tensor in asked]
        products = torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            asked,
            grad_outputs=[along for _, along in pairs],
            allow_unused=True,
        )
    return [
        torch.zeros_like(tensor) if product is None else product.detach()
        for tensor, product in zip(asked, products, strict=True)
    ]


class _Pass(nn.Module):
    """A loss and its gradients as one call, so that both happen while the dual weights stand in the model."""

    def __init__(self, model: nn.Module, loss: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        # Without this the training flag of the wrapper would be the only one that is on.
        self.training = False

    def forward(self, batch: Any, asked: list[Tensor]) -> tuple[Tensor | None, ...]:
        value = scalar_loss(self.loss, self.model, batch)
        return torch.autograd.grad(value, asked, allow_unused=True)


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
) -> tuple[tuple[Tensor | None, ...], list[Tensor]]:
    """Gradients at the weights plus a dual step along the direction; their tangents are the products."""
    leaves = [ref.value.detach().requires_grad_(True) for ref in refs]
    duals = [forward_ad.make_dual(leaf, along) for leaf, along in zip(leaves, direction, strict=True)]
    asked = [duals[i] for i in scored]
    weights = {f"model.{ref.name}": dual for ref, dual in zip(refs, duals, strict=True)}
    gradients = torch.func.functional_call(_Pass(model, loss), weights, (batch, asked))
    return gradients, [leaves[i] for i in scored]


_WAYS: dict[Way, _Product] = {
    "forward_over_reverse": _forward_over_reverse,
    "double_backward": _double_backward,
}


def choose_way(
    model: nn.Module,
    refs: list[TensorRef],
    scored: list[int],
    batch: Any,
    loss: LossFn,
    prefer: Way | None = None,
) -> Way:
    """The way to take, tried on one example before anything is spent on the others.

    Args:
        model: The model, in evaluation mode.
        refs: What gradient flow moves.
        scored: Positions in `refs` of the tensors whose products are asked for.
        batch: A batch on the model's device.
        loss: The mean loss of a batch.
        prefer: The way to try first; None: `preferred_way`.

    Raises:
        ValueError: The model can be differentiated twice by neither way; the message names the operator.
    """
    size = batch_size(batch)
    one = map_tensors(batch, lambda t: t[:1] if t.ndim and len(t) == size else t)
    with one_weight_a_pass():
        value = scalar_loss(loss, model, one)
        refuse_reentrant(value)
        custom = sorted({type(node).__name__ for node in graph_nodes(value) if _is_custom(node)})
        tensors = [ref.value for ref in refs]
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    direction = [gradient.detach() for gradient in without_gaps(tensors, gradients)]
    first = prefer or preferred_way(refs)
    other: Way = "double_backward" if first == "forward_over_reverse" else "forward_over_reverse"
    errors = []
    for way in (first, other):
        if way == "forward_over_reverse" and not all(isinstance(ref.value, nn.Parameter) for ref in refs):
            continue
        try:
            if way == "forward_over_reverse":
                _check_reached(model, refs, direction, one, loss, gradients)
            else:
                _check_twice(refs, model, one, loss)
            _WAYS[way](model, refs, scored, direction, one, loss)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            errors.append(f"{way.replace('_', ' ')}: {str(error).strip().splitlines()[0]}")
            continue
        if errors:
            log.info("Hessian-gradient products by %s, since %s", way.replace("_", " "), errors[0])
        return way
    named = f" (custom functions in the graph: {', '.join(custom)})" if custom else ""
    raise ValueError(
        f"score_filters: this measure needs second derivatives, which the model does not have{named}: {'; '.join(errors)}"
    )


def _is_custom(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _check_twice(refs: list[TensorRef], model: nn.Module, batch: Any, loss: LossFn) -> None:
    """Some functions end the graph of their gradients in an error that is met only on the way to nobody's input.

    `torch.autograd.grad` walks to its inputs alone and would pass by: the product would be wrong without a word.
    """
    with one_weight_a_pass():
        value = scalar_loss(loss, model, batch)
        gradients = torch.autograd.grad(value, [ref.value for ref in refs], create_graph=True, allow_unused=True)
    if any(_is_error(node) for node in graph_nodes(*(g for g in gradients if g is not None))):
        raise RuntimeError("a function in the graph can be differentiated only once")


def _is_error(node: Any) -> bool:
    return node.name().split("::")[-1] in ("Error", "NotImplemented")


def _check_reached(
    model: nn.Module,
    refs: list[TensorRef],
    direction: list[Tensor],
    batch: Any,
    loss: LossFn,
    plain: tuple[Tensor | None, ...],
) -> None:
    """Some modules keep their weights in a list of their own (recurrent ones), where no dual number reaches them."""
    with forward_ad.dual_level():
        gradients, _ = _dual_gradients(model, refs, list(range(len(refs))), direction, batch, loss)
    for ref, dual, gradient in zip(refs, gradients, plain, strict=True):
        if (dual is None) != (gradient is None):
            raise RuntimeError(f"dual numbers do not reach the weight '{ref.name}'")


class HessianProducts:
    """Products H g of a mean loss over samples, g its gradient with respect to all that gradient flow moves.

    Args:
        model: The model, in evaluation mode.
        layers: Its layers.
        refs: The tensors whose products are asked for.
        loss: The mean loss of a batch.
        first: A batch on the model's device; one example of it is used to choose the way.
        prefer: The way to try first; None: `preferred_way`.

    Raises:
        ValueError: The model has no second derivatives.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[ScoredLayer],
        refs: list[TensorRef],
        loss: LossFn,
        first: Any,
        prefer: Way | None = None,
    ) -> None:
        self.model = model
        self.refs = flow_tensors(model, layers)
        places = {id(ref.value): i for i, ref in enumerate(self.refs) if isinstance(ref.value, nn.Parameter)}
        names = {ref.name: i for i, ref in enumerate(self.refs)}
        # By identity first: a tied weight is moved once, under its first name, and asked for under each.
        asked = [places.get(id(ref.value), names.get(ref.name, -1)) for ref in refs]
        self.names = [ref.name for ref in refs]
        self.scored = sorted(set(asked))
        self._place = [self.scored.index(i) for i in asked]
        self.loss = loss
        self.way = choose_way(model, self.refs, self.scored, first, loss, prefer)

    def of(self, sample: list[Any], ranks: Ranks) -> dict[str, Tensor]:
        """The products over a sample by tensor name; g is averaged over the ranks before the products are taken.

        Args:
            sample: Batches of this rank on the device; there may be none.
            ranks: The processes that score together.
        """
        direction = self._gradient(sample, ranks)
        totals = [_zeros(self.refs[i].value) for i in self.scored]
        for batch in sample:
            products = _WAYS[self.way](self.model, self.refs, self.scored, direction, batch, self.loss)
            for total, product in zip(totals, products, strict=True):
                total.add_(product, alpha=batch_size(batch))
        means = ranks.weighted_mean(totals, sum(map(batch_size, sample)))
        return {name: means[place] for name, place in zip(self.names, self._place, strict=True)}

    def _gradient(self, sample: list[Any], ranks: Ranks) -> list[Tensor]:
        sums = [_zeros(ref.value) for ref in self.refs]
        device = sums[0].device
        for size, gradients in batch_gradients(self.model, self.refs, sample, self.loss, device):
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient, alpha=size)
        means = ranks.weighted_mean(sums, sum(map(batch_size, sample)))
        return [mean.to(ref.value.dtype) for mean, ref in zip(means, self.refs, strict=True)]


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=accumulator_dtype(tensor), requires_grad=False)

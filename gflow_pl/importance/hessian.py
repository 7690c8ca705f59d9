"""Hessian-gradient products, exact, in batches of any size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gflow_pl.common.attention import attention_fast_path_disabled
from gflow_pl.common.nested import map_tensors
from gflow_pl.importance.batches import batch_size, to_device
from gflow_pl.importance.gradients import LossFn, accumulator_dtype, batch_gradients
from gflow_pl.importance.hessian_strategies import WAYS, Way, choose_way, watched_loss
from gflow_pl.importance.layers import ScoredLayer, TensorRef
from gflow_pl.importance.reduction import Ranks

__all__ = ["HessianProducts", "flow_tensors", "second_order_kernels"]


@contextmanager
def second_order_kernels() -> Iterator[None]:
    """Only kernels with second derivatives: plain attention, no fused transformer layer, nothing compiled."""
    with attention_fast_path_disabled(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
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


class HessianProducts:
    """Products H g of a mean loss over samples, g its gradient with respect to all that gradient flow moves.

    Args:
        model: The model, in evaluation mode.
        layers: Its layers.
        refs: The tensors whose products are asked for.
        loss: The mean loss of a batch.
        first: A batch on the model's device; two examples of it are used to choose the way, before anything is spent on
            the others. A batch that turns out to be computed otherwise, by a branch of the model's, gets a way of its own.
        prefer: The way to try first; None: the order of `possible_ways`.

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
        for ref in refs:
            # What is asked for and is no parameter (a norm's weight that is held as a buffer) is moved as well.
            if id(ref.value) not in places and ref.name not in names:
                names[ref.name] = len(self.refs)
                self.refs.append(ref)
        # By identity first: a tied weight is moved once, under its first name, and asked for under each.
        asked = [places[id(ref.value)] if id(ref.value) in places else names[ref.name] for ref in refs]
        self.names = [ref.name for ref in refs]
        self.scored = sorted(set(asked))
        self._place = [self.scored.index(i) for i in asked]
        self.loss = loss
        self.prefer = prefer
        size = batch_size(first)
        # Not one: what works on one example alone is often another operator (a vector in place of a matrix).
        few = map_tensors(first, lambda t: t[:2] if t.ndim and len(t) == size else t)
        self.way, facts = choose_way(model, self.refs, self.scored, few, loss, prefer)
        self._ways = {facts: self.way}

    def of(self, sample: list[Any], ranks: Ranks) -> dict[str, Tensor]:
        """The products over a sample by tensor name; g is averaged over the ranks before the products are taken.

        Args:
            sample: Batches of this rank, gone through twice; there may be none. Each is on the device in its turn only.
            ranks: The processes that score together.
        """
        direction, facts = self._gradient(sample, ranks)
        totals = [_zeros(self.refs[i].value) for i in self.scored]
        for batch, made_by in zip(sample, facts, strict=True):
            examples = to_device(batch, totals[0].device)
            products = WAYS[self._way_for(examples, made_by)](
                self.model, self.refs, self.scored, direction, examples, self.loss
            )
            torch._foreach_add_(totals, products, alpha=batch_size(batch))
        means = ranks.weighted_mean(totals, sum(map(batch_size, sample)))
        return {name: means[place] for name, place in zip(self.names, self._place, strict=True)}

    def _way_for(self, batch: Any, facts: tuple[str, ...]) -> Way:
        """The way of a batch that is computed by these operators."""
        if facts not in self._ways:
            known = [way for met, way in self._ways.items() if set(facts) <= set(met)]
            self._ways[facts] = (
                known[0] if known else choose_way(self.model, self.refs, self.scored, batch, self.loss, self.prefer)[0]
            )
        return self._ways[facts]

    def _gradient(self, sample: list[Any], ranks: Ranks) -> tuple[list[Tensor], list[tuple[str, ...]]]:
        """The gradient, and the facts of every batch as its pass shows them: no further pass is needed."""
        facts: list[tuple[str, ...]] = []

        def watched(model: nn.Module, batch: Any) -> Tensor:
            value, found = watched_loss(model, batch, self.loss)
            facts.append(found)
            return value

        sums = [_zeros(ref.value) for ref in self.refs]
        device = sums[0].device
        for size, gradients in batch_gradients(self.model, self.refs, sample, watched, device):
            torch._foreach_add_(sums, gradients, alpha=size)
        means = ranks.weighted_mean(sums, sum(map(batch_size, sample)))
        return [mean.to(ref.value.dtype) for mean, ref in zip(means, self.refs, strict=True)], facts


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=accumulator_dtype(tensor), requires_grad=False)

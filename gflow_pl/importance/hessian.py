"""Exact Hessian-gradient products over batches of any size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gflow_pl.common.attention import attention_fast_path_disabled
from gflow_pl.common.nested import map_tensors
from gflow_pl.importance.batches import Batch, batch_size, to_device
from gflow_pl.importance.gradients import LossFn, accumulator_dtype, batch_gradients
from gflow_pl.importance.hessian_strategies import STRATEGIES, Strategy, choose_strategy
from gflow_pl.importance.layers import ScoredLayer, TensorRef
from gflow_pl.importance.loss_operators import loss_and_operators
from gflow_pl.importance.reduction import Ranks

__all__ = ["HessianProducts", "flow_tensors", "second_order_kernels"]


@contextmanager
def second_order_kernels() -> Iterator[None]:
    """Use only kernels that have second derivatives: plain attention, no fused transformer layers, nothing compiled."""
    with attention_fast_path_disabled(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        yield


def flow_tensors(model: nn.Module, layers: list[ScoredLayer]) -> list[TensorRef]:
    """Return the tensors that gradient flow moves: every floating-point parameter, once.

    Of a layer whose weight is derived from other parameters, the weight is returned in place of these.
    """
    refs: list[TensorRef] = []
    sources: list[str] = []
    for layer in layers:
        if not isinstance(layer.weight, nn.Parameter):
            ref = layer.tensors("weight")[0]
            refs.append(ref)
            prefix, own = f"{layer.module_name}." if layer.module_name else "", ref.attribute
            sources += [prefix + part for part in (f"parametrizations.{own}.", f"{own}_g", f"{own}_v", f"{own}_orig")]
    seen: set[int] = set()
    for owner_name, owner in model.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{attribute}" if owner_name else attribute
            if id(parameter) in seen or not parameter.is_floating_point() or name.startswith(tuple(sources)):
                continue
            seen.add(id(parameter))
            refs.append(TensorRef(owner, attribute, name))
    return refs


class HessianProducts:
    """Hessian-gradient products H g of the mean loss over samples.

    The gradient g and the Hessian H are those of all tensors that gradient flow moves.

    The strategy is chosen on two examples, before anything is spent on the others. A batch that the model computes with
    other operators (a branch that depends on the data) gets its own strategy.

    Args:
        model: The model, in `scoring_mode`.
        layers: Its layers.
        refs: Tensors whose products are needed.
        loss: Mean loss of a batch.
        first: A batch on the model's device.
        strategy: Strategy to use for all batches; None for the fastest that the model allows.

    Attributes:
        strategy: The strategy chosen for `first`.

    Raises:
        SettingsError: The model has no second derivatives.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[ScoredLayer],
        refs: list[TensorRef],
        loss: LossFn,
        first: Batch,
        strategy: Strategy | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self._forced = strategy
        self.names = [ref.name for ref in refs]

        # Only the tensors in `refs` need rows of H g, but g is the gradient of all tensors that gradient flow moves.
        self.refs = flow_tensors(model, layers)
        places = {id(ref.value): i for i, ref in enumerate(self.refs) if isinstance(ref.value, nn.Parameter)}
        names = {ref.name: i for i, ref in enumerate(self.refs)}
        for ref in refs:
            # A tensor that is not a parameter (a norm's weight that is a buffer) is added.
            if id(ref.value) not in places and ref.name not in names:
                names[ref.name] = len(self.refs)
                self.refs.append(ref)
        # Look up parameters by identity: a tied weight is in `self.refs` once, under its first name, but `refs` may
        # contain it under each of its names.
        asked = [places[id(ref.value)] if id(ref.value) in places else names[ref.name] for ref in refs]
        self.scored = sorted(set(asked))
        self._place = [self.scored.index(i) for i in asked]

        # Two examples, since models often use other operators for a single one (a vector instead of a matrix).
        size = batch_size(first)
        few = map_tensors(first, lambda t: t[:2] if t.ndim and len(t) == size else t)
        self.strategy, operators = self._choose(few)
        self._strategies = {operators: self.strategy}

    def compute(self, sample: list[Batch], ranks: Ranks) -> dict[str, Tensor]:
        """Return the products over a sample by tensor name. The gradient is averaged over the ranks first.

        Args:
            sample: Batches of this rank, possibly none. Every batch is moved to the device twice, one at a time.
            ranks: The ranks that score together.
        """
        direction, operators = self._gradient(sample, ranks)
        totals = [_zeros(self.refs[i].value) for i in self.scored]
        for batch, used in zip(sample, operators, strict=True):
            examples = to_device(batch, totals[0].device)
            product = STRATEGIES[self._strategy_for(examples, used)]
            parts = product(self.model, self.refs, self.scored, direction, examples, self.loss)
            torch._foreach_add_(totals, parts, alpha=batch_size(batch))
        means = ranks.weighted_mean(totals, sum(map(batch_size, sample)))
        return {name: means[place] for name, place in zip(self.names, self._place, strict=True)}

    def _choose(self, batch: Batch) -> tuple[Strategy, frozenset[str]]:
        return choose_strategy(self.model, self.refs, self.scored, batch, self.loss, self._forced)

    def _strategy_for(self, batch: Batch, operators: frozenset[str]) -> Strategy:
        """Return the strategy for a batch that is computed with these operators; choose one if they are new."""
        if operators not in self._strategies:
            known = [strategy for others, strategy in self._strategies.items() if operators <= others]
            self._strategies[operators] = known[0] if known else self._choose(batch)[0]
        return self._strategies[operators]

    def _gradient(self, sample: list[Batch], ranks: Ranks) -> tuple[list[Tensor], list[frozenset[str]]]:
        """Return the mean gradient of all ranks, and the operators of every batch, which the same passes show."""
        operators: list[frozenset[str]] = []

        def observed_loss(model: nn.Module, batch: Batch) -> Tensor:
            value, used = loss_and_operators(self.loss, model, batch)
            operators.append(used)
            return value

        sums = [_zeros(ref.value) for ref in self.refs]
        for size, gradients in batch_gradients(self.model, self.refs, sample, observed_loss, sums[0].device):
            torch._foreach_add_(sums, gradients, alpha=size)
        means = ranks.weighted_mean(sums, sum(map(batch_size, sample)))
        return [mean.to(ref.value.dtype) for mean, ref in zip(means, self.refs, strict=True)], operators


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=accumulator_dtype(tensor), requires_grad=False)

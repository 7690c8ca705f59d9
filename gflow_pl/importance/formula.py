"""From tensors to scores: a measure's formula, with its bias, over all layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from gflow_pl.importance.base import Importance
from gflow_pl.importance.gradients import accumulator_dtype
from gflow_pl.importance.layers import ScoredLayer, gradient_rows, unique_refs, weight_rows
from gflow_pl.values import Scores
from gflow_pl.values.choices import Bias, check_choice

__all__ = ["FilterFormula", "rows_of", "step_average", "values_of"]

log = logging.getLogger(__name__)


def values_of(layers: list[ScoredLayer], measure: Importance) -> dict[str, Tensor]:
    """The tensors that the measure looks at, as they are now, in the dtype of sums; no copy where that is theirs."""
    return {
        ref.name: (value := ref.value.detach()).to(accumulator_dtype(value))
        for ref in unique_refs(layers, measure.reads)
    }


def rows_of(layers: list[ScoredLayer], measure: Importance, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Anything linear in the gradients, by layer, (filters, values of one filter)."""
    values = values_of(layers, measure)
    return {layer.name: gradient_rows(layer, measure.reads, values, gradients) for layer in layers}


class FilterFormula:
    """A measure with the bias it is used with.

    Args:
        measure: The measure.
        bias: "none", "magnitude", "distance_from_init"; None: the last where `initial_state` is given, else the measure's.
        initial_state: Initial weights by name.

    Raises:
        ValueError: The bias is unknown, or needs initial weights that are not given.
    """

    def __init__(
        self, measure: Importance, bias: Bias | None = None, initial_state: Mapping[str, Tensor] | None = None
    ) -> None:
        if bias is not None:
            check_choice("bias", bias, Bias)
        if bias == "distance_from_init" and initial_state is None:
            raise ValueError("The bias 'distance_from_init' needs `initial_state`: the initial weights by name.")
        if bias not in (None, "none") and not measure.needs_gradients:
            log.warning("Measure '%s' has no gradient term, so the bias '%s' is not applied.", measure.name, bias)
        self.measure = measure
        self.initial_state = initial_state
        chosen = bias or ("distance_from_init" if initial_state is not None else measure.default_bias)
        self.bias: Bias = chosen if measure.needs_gradients else "none"

    def scores(
        self,
        layers: list[ScoredLayer],
        values: Mapping[str, Tensor],
        flows: Mapping[str, Tensor] | None,
        generator: torch.Generator | None = None,
    ) -> Scores:
        """The scores of all layers, checked to be finite."""
        return Scores(self.vectors(layers, values, flows, generator), measure=self.measure.name)

    @torch.no_grad()
    def vectors(
        self,
        layers: list[ScoredLayer],
        values: Mapping[str, Tensor],
        flows: Mapping[str, Tensor] | None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """A vector (filters,) a layer.

        Args:
            layers: The layers.
            values: Tensors by name, see `values_of`.
            flows: The measure's statistic by layer, see `rows_of`; None where it needs no gradient.
            generator: Of "noise".

        Raises:
            ValueError: The summand has not the shape that it should have.
        """
        vectors = {}
        for layer in layers:
            theta = weight_rows(layer, self.measure.reads, values)
            if flows is not None:
                flow = flows[layer.name]
            elif self.measure.statistic == "noise":
                flow = _noise(theta, generator)
            else:
                flow = theta
            terms = self.measure.summand(theta, flow)
            if not isinstance(terms, Tensor) or terms.ndim != 2 or len(terms) != len(theta):
                raise ValueError(
                    f"Measure '{self.measure.name}': `summand` must return (filters, weights of one filter), here "
                    f"{tuple(theta.shape)}, got {tuple(getattr(terms, 'shape', ()))}."
                )
            if self.bias != "none":
                terms = terms * self._bias_rows(layer, theta, values)
            vectors[layer.name] = self.measure.finish(terms.sum(1))
        return vectors

    def _bias_rows(self, layer: ScoredLayer, theta: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        if self.bias == "magnitude":
            return theta.abs()
        assert self.initial_state is not None
        initial = {}
        for ref in layer.tensors(self.measure.reads):
            now = values[ref.name]
            start = ref.value_by(self.initial_state)
            if start is None or start.shape != now.shape:
                got = "none" if start is None else tuple(start.shape)
                raise ValueError(
                    f"`initial_state` must hold '{ref.name}' of shape {tuple(now.shape)}, got {got}; "
                    "it is the state dict of the model at initialisation, cut in the same way."
                )
            initial[ref.name] = start.to(now)
        return (theta - weight_rows(layer, self.measure.reads, initial)).abs()


def _noise(theta: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        raise ValueError("A measure of noise needs a generator.")
    shape = (len(theta), 1)
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32).to(theta)


def step_average(running: Mapping[str, Tensor], new: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """``alpha * new + (1 - alpha) * running`` by name.

    A name that is not there yet counts as zero, as published; one that is not new stays as it is.
    """
    stepped = dict(running)
    for name, vector in new.items():
        stepped[name] = alpha * vector + (1 - alpha) * running[name].to(vector) if name in running else alpha * vector
    return stepped

"""The formula of a measure, with its bias, applied to all layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from gflow_pl.common.checks import check_choice
from gflow_pl.common.errors import SettingsError
from gflow_pl.importance.base import Importance
from gflow_pl.importance.gradients import accumulator_dtype
from gflow_pl.importance.layers import ScoredLayer, unique_refs
from gflow_pl.importance.rows import gradient_rows, weight_rows
from gflow_pl.values.choices import Bias

__all__ = ["FilterFormula", "exponential_average", "layer_rows", "layer_values"]

log = logging.getLogger(__name__)


def layer_values(layers: list[ScoredLayer], measure: Importance) -> dict[str, Tensor]:
    """Return the tensors that a measure reads of all layers, by name, in float32 or float64.

    The tensors are copied only if they have another dtype.
    """
    return {
        ref.name: (value := ref.value.detach()).to(accumulator_dtype(value))
        for ref in unique_refs(layers, measure.reads)
    }


def layer_rows(layers: list[ScoredLayer], measure: Importance, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients, or tensors that are linear in them, by layer name as (filters, values of one filter)."""
    values = layer_values(layers, measure)
    return {layer.name: gradient_rows(layer, measure.reads, values, gradients) for layer in layers}


class FilterFormula:
    """A measure together with the bias that it is used with.

    Args:
        measure: The measure.
        bias: "none", "magnitude" or "distance_from_init". None: "distance_from_init" if `initial_state` is given, else
            the default of the measure. A measure without gradients ignores it, with a warning.
        initial_state: Initial weights by name.

    Raises:
        SettingsError: The bias is unknown, or needs initial weights that are not given.
    """

    def __init__(
        self, measure: Importance, bias: Bias | None = None, initial_state: Mapping[str, Tensor] | None = None
    ) -> None:
        if bias is not None:
            check_choice("bias", bias, Bias)
        if bias == "distance_from_init" and initial_state is None:
            raise SettingsError("The bias 'distance_from_init' needs `initial_state`: the initial weights by name.")
        if bias not in (None, "none") and not measure.needs_gradients:
            log.warning("Measure '%s' has no gradient term, so the bias '%s' is not applied.", measure.name, bias)
        self.measure = measure
        self.initial_state = initial_state
        chosen = bias or ("distance_from_init" if initial_state is not None else measure.default_bias)
        self.bias: Bias = chosen if measure.needs_gradients else "none"

    @torch.no_grad()
    def vectors(
        self,
        layers: list[ScoredLayer],
        values: Mapping[str, Tensor],
        flows: Mapping[str, Tensor] | None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return the scores of all filters: one vector (filters,) for each layer, by name.

        Args:
            layers: The layers.
            values: Tensors that the measure reads, see `layer_values`.
            flows: Statistic of the measure by layer name, (filters, values of one filter). None for the statistics
                "weights" and "noise", which follow from the layers.
            generator: Generator of the statistic "noise".

        Raises:
            SettingsError: `summand` of the measure returns a tensor of a wrong shape.
        """
        vectors = {}
        for layer in layers:
            # The weights and the statistic, one row for each filter.
            theta = weight_rows(layer, self.measure.reads, values)
            if flows is not None:
                flow = flows[layer.name]
            elif self.measure.statistic == "noise":
                flow = _noise(theta, generator)
            else:
                flow = theta
            # The formula.
            terms = self.measure.summand(theta, flow)
            if not isinstance(terms, Tensor) or terms.ndim != 2 or len(terms) != len(theta):
                raise SettingsError(
                    f"Measure '{self.measure.name}': `summand` must return (filters, weights of one filter), here "
                    f"{tuple(theta.shape)}, got {tuple(getattr(terms, 'shape', ()))}."
                )
            if self.bias != "none":
                terms = terms * self._bias_rows(layer, theta, values)
            vectors[layer.name] = self.measure.finish(terms.sum(1))
        return vectors

    def _bias_rows(self, layer: ScoredLayer, theta: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Return the factor on every weight, (filters, weights of one filter)."""
        if self.bias == "magnitude":
            return theta.abs()
        assert self.initial_state is not None
        initial = {}
        for ref in layer.tensors(self.measure.reads):
            now = values[ref.name]
            start = ref.value_from(self.initial_state)
            if start is None or start.shape != now.shape:
                got = "none" if start is None else tuple(start.shape)
                raise SettingsError(
                    f"`initial_state` must hold '{ref.name}' of shape {tuple(now.shape)}, got {got}; "
                    "it is the state dict of the model at initialization, cut in the same way."
                )
            initial[ref.name] = start.to(now)
        return (theta - weight_rows(layer, self.measure.reads, initial)).abs()


def _noise(theta: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return one uniform number in [0, 1) for each filter, (filters, 1), with the dtype and device of `theta`.

    The numbers are drawn in float32, so that they are the same for weights of any dtype.
    """
    assert generator is not None
    shape = (len(theta), 1)
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32).to(theta)


def exponential_average(running: Mapping[str, Tensor], new: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return ``alpha * new + (1 - alpha) * running`` by name.

    A name without a running value starts from zero, as in the published code. A name without a new value is unchanged.
    """
    averaged = dict(running)
    for name, vector in new.items():
        averaged[name] = alpha * vector + (1 - alpha) * running[name].to(vector) if name in running else alpha * vector
    return averaged

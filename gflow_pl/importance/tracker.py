"""Scores from the gradients of training itself, averaged exponentially over its batches: no extra pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gflow_pl.importance.base import Bias, Importance
from gflow_pl.importance.batches import to_device
from gflow_pl.importance.formula import FilterFormula, rows_of, step_average, values_of
from gflow_pl.importance.gradients import LogitsFn, LossFn, accumulator_dtype, loss_function
from gflow_pl.importance.hessian import HessianProducts, second_order_kernels
from gflow_pl.importance.layers import ScoredLayer, find_layers, say_what_stands_in, unique_refs
from gflow_pl.importance.measures import resolve_measure
from gflow_pl.importance.reduction import Ranks, Reduce
from gflow_pl.importance.score import checked_temperature, private_generator
from gflow_pl.importance.scoring_mode import scoring_mode
from gflow_pl.values import ChannelGraph, Scores

__all__ = ["Tracker"]

log = logging.getLogger(__name__)


class Tracker:
    """The exponential average of a measure's scores: ``running = alpha * new + (1 - alpha) * running``, zero at first.

    One `update` is one global batch: its gradient, unscaled and before clipping, with the weights that the model has
    at that moment. Called before the optimizer's step, gradient and weights belong together, which is what the
    formulas mean; called after it, with the gradients kept from before, it is the order of the published code.
    A squared gradient is really squared (the published tracked `fisher` and `nvidia` forget it).

    Args:
        measure: A name or an `Importance`; all can be tracked. One that needs Hessian products costs one product a batch.
        alpha: Share of the newest batch, in (0, 1]; None: the measure's own (0.8).
        graph: A `ChannelGraph`, which pairs norms with layers.
        bias: As in `score_filters`.
        initial_state: As in `score_filters`; the mapping is read at each update.
        loss_fn: Of Hessian measures, as in `score_filters`.
        logits_fn: Of Hessian measures, as in `score_filters`.
        temperature: Of Hessian measures, > 0; others use the gradients of training, whatever its temperature.
        reduce: Of Hessian measures: averages a tensor over the ranks. Gradients are given as those of the global batch.
        seed: Of `random`.

    Attributes:
        has_logged: Whether the messages about unscored layers and cost are logged already; else the first update logs them.

    Raises:
        ValueError: A setting is unknown or out of range.
    """

    def __init__(
        self,
        measure: str | Importance,
        *,
        alpha: float | None = None,
        graph: ChannelGraph | None = None,
        bias: Bias | None = None,
        initial_state: Mapping[str, Tensor] | None = None,
        loss_fn: LossFn | None = None,
        logits_fn: LogitsFn | None = None,
        temperature: float | None = None,
        reduce: Reduce | None = None,
        seed: int = 0,
    ) -> None:
        self.measure = resolve_measure(measure)
        self.alpha = self.measure.alpha if alpha is None else alpha
        if not 0 < self.alpha <= 1:
            raise ValueError(f"Tracker: `alpha` is the share of the newest batch, in (0, 1], got {alpha}.")
        self.graph = graph
        self.seed = seed
        self.num_updates = 0
        self._formula = FilterFormula(self.measure, bias, initial_state)
        self._loss = loss_function(loss_fn, logits_fn, checked_temperature(self.measure, temperature))
        self._reduce = reduce
        self._running: dict[str, Tensor] = {}
        self.has_logged = False
        self._made: HessianProducts | None = None

    def names(self, model: nn.Module) -> list[str]:
        """The parameters, by name, whose gradients `update` wants; none for measures that need no gradient.

        A Hessian measure wants a batch in their place.
        """
        if not self.measure.needs_gradients or self.measure.needs_hessian:
            return []
        with scoring_mode(model):
            return [ref.name for ref in unique_refs(find_layers(model, self.graph), self.measure.reads)]

    def update(
        self, model: nn.Module, gradients: Mapping[str, Tensor | None] | None = None, *, batch: Any = None
    ) -> None:
        """Take in one global batch.

        Args:
            model: The model, with the weights to use; nothing of it changes.
            gradients: Gradients of the mean loss over the global batch by parameter name, at least `names`. A layer
                whose gradient is missing or None (a frozen one) is left out, and that is logged once.
            batch: Of Hessian measures: this rank's batch, scored in evaluation mode.

        Raises:
            ValueError: What the measure needs is not given, or no layer has a gradient.
        """
        with scoring_mode(model):
            layers = find_layers(model, self.graph)
            if not self.has_logged:
                say_what_stands_in(layers, self.measure.reads, self.measure.name)
                if self.measure.needs_hessian:
                    log.warning("Tracking '%s' costs a Hessian-gradient product a tracked step.", self.measure.name)
            flows = None
            if self.measure.needs_hessian:
                flows = self._products(model, layers, batch)
            elif self.measure.needs_gradients:
                layers, flows = self._flows(layers, gradients)
            generator = private_generator(layers, self.seed)
            new = self._formula.vectors(layers, values_of(layers, self.measure), flows, generator)
        self._running = step_average(self._running, new, self.alpha)
        self.num_updates += 1
        self.has_logged = True

    def _flows(
        self, layers: list[ScoredLayer], gradients: Mapping[str, Tensor | None] | None
    ) -> tuple[list[ScoredLayer], dict[str, Tensor]]:
        if gradients is None:
            raise ValueError(f"Tracker: measure '{self.measure.name}' needs `gradients`, got None.")
        given = {name: gradient.detach() for name, gradient in gradients.items() if gradient is not None}
        reached = [layer for layer in layers if all(ref.name in given for ref in layer.tensors(self.measure.reads))]
        missing = [layer.name for layer in layers if layer not in reached]
        if not reached:
            raise ValueError(f"Tracker: none of the layers has a gradient ({', '.join(missing[:3])}, ...).")
        if missing and not self.has_logged:
            log.warning(
                "Layers whose weights get no gradient in training (frozen, or computed where it cannot be followed) are not "
                "scored, so that they have no say over their groups, which stay whole if nobody else has: %s.",
                ", ".join(missing),
            )
        wanted = [ref.name for ref in unique_refs(reached, self.measure.reads)]
        wide = {name: given[name].to(accumulator_dtype(given[name])) for name in wanted}
        flows = rows_of(reached, self.measure, wide)
        if self.measure.statistic == "squared_gradient":
            flows = {name: row.square() for name, row in flows.items()}
        return reached, flows

    def _products(self, model: nn.Module, layers: list[ScoredLayer], batch: Any) -> dict[str, Tensor]:
        if batch is None:
            raise ValueError(f"Tracker: measure '{self.measure.name}' needs the `batch`, got None.")
        refs = unique_refs(layers, self.measure.reads)
        with second_order_kernels():
            examples = to_device(batch, refs[0].value.device)
            if self._made is None or self._made.model is not model:
                self._made = HessianProducts(model, layers, refs, self._loss, examples)
            return rows_of(layers, self.measure, self._made.of([examples], Ranks(self._reduce)))

    def scores(self) -> Scores:
        """The average so far.

        Raises:
            ValueError: Nothing was tracked yet, or a score is not finite.
        """
        if not self._running:
            raise ValueError("Tracker: no batch was tracked since the start or the last reset.")
        return Scores(self._running, measure=self.measure.name)

    def reset(self) -> None:
        """Start anew, as after every round."""
        self._running = {}
        self._made = None
        self.num_updates = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors by name: "num_updates", and "scores.<layer>" for every layer."""
        state = {f"scores.{name}": vector.clone() for name, vector in self._running.items()}
        return {"num_updates": torch.tensor(self.num_updates), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a saved average.

        Raises:
            ValueError: That is no tracker's state.
        """
        others = [name for name in state if name != "num_updates" and not name.startswith("scores.")]
        if "num_updates" not in state or others:
            raise ValueError(
                f"Tracker: a saved state holds 'num_updates' and 'scores.<layer>', got {sorted(state)[:5]}."
            )
        self.num_updates = int(state["num_updates"])
        self._running = {
            name.removeprefix("scores."): vector.clone() for name, vector in state.items() if name != "num_updates"
        }

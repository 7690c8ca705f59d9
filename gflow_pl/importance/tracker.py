"""Tracked scores: an exponential average over the batches of training, from the gradients of training itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gflow_pl.common.errors import SettingsError
from gflow_pl.importance.activations import forward_function, mean_activation_scores
from gflow_pl.importance.base import ActivationImportance, Importance
from gflow_pl.importance.batches import Batch, to_device
from gflow_pl.importance.formula import FilterFormula, exponential_average, layer_rows, layer_values
from gflow_pl.importance.gradients import LogitsFn, LossFn, accumulator_dtype, loss_function
from gflow_pl.importance.hessian import HessianProducts, second_order_kernels
from gflow_pl.importance.layers import ScoredLayer, find_layers, log_layers_without_norm, unique_refs
from gflow_pl.importance.measures import resolve_measure
from gflow_pl.importance.reduction import Ranks, Reduce
from gflow_pl.importance.score import checked_temperature, private_generator
from gflow_pl.importance.scoring_mode import scoring_mode
from gflow_pl.values import ChannelGraph, Scores
from gflow_pl.values.choices import Bias

__all__ = ["Tracker"]

log = logging.getLogger(__name__)


class Tracker:
    """Exponential average of the scores of a measure.

    ``running = alpha * new + (1 - alpha) * running``, starting from zero.

    One `update` takes one global batch: its gradient, unscaled and before clipping, and the weights that the model has
    at that moment. Called before the step of the optimizer, gradient and weights belong together, as in the formulas.
    Called after the step, with the gradients of before, it follows the order of the published code. Squared gradients
    are squared (the published tracked `fisher` and `nvidia` omit the square).

    Args:
        measure: Name of a measure, or an `Importance`. A measure of Hessian products costs one product for each batch,
            a measure of activations one forward pass.
        alpha: Weight of the newest batch, in (0, 1]. None: the measure's own (0.8).
        graph: Graph that names the norm behind each layer.
        bias: As in `score_filters`.
        initial_state: As in `score_filters`. The mapping is read at every update.
        loss_fn: As in `score_filters`, for measures of Hessian products and of activations.
        logits_fn: As in `score_filters`, for measures of Hessian products and of activations.
        temperature: Divisor of the logits, > 0, for measures of Hessian products. Other measures take the gradients of
            training, at its temperature.
        reduce: Averages a tensor over the ranks, for measures of Hessian products and of activations. The gradients of
            other measures are given as those of the global batch.
        seed: Seed of the private generator of `random`.

    Attributes:
        has_logged: Whether the messages about unscored layers and about cost are logged. The first update logs them,
            unless this is set before.
        num_updates: Number of updates since the start or the last reset.

    Raises:
        SettingsError: A setting is unknown or out of range.
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
            raise SettingsError(f"Tracker: `alpha` is the share of the newest batch, in (0, 1], got {alpha}.")
        self.graph = graph
        self.seed = seed
        self.num_updates = 0
        self.has_logged = False
        self._formula = FilterFormula(self.measure, bias, initial_state)
        self._loss = loss_function(loss_fn, logits_fn, checked_temperature(self.measure, temperature))
        self._forward = forward_function(loss_fn, logits_fn)
        self._reduce = reduce
        self._running: dict[str, Tensor] = {}
        self._hessian_products: HessianProducts | None = None

    def names(self, model: nn.Module) -> list[str]:
        """Return the names of the tensors whose gradients `update` needs.

        The list is empty for measures that need no gradients, or need a batch instead.
        """
        if not self.measure.needs_gradients or self.measure.needs_hessian:
            return []
        with scoring_mode(model):
            return [ref.name for ref in unique_refs(find_layers(model, self.graph), self.measure.reads)]

    def update(
        self, model: nn.Module, gradients: Mapping[str, Tensor | None] | None = None, *, batch: Batch = None
    ) -> None:
        """Add one global batch to the average.

        Args:
            model: The model with its current weights. It does not change.
            gradients: Gradients of the mean loss over the global batch by tensor name, at least those of `names`. A
                layer whose gradient is missing or None (a frozen one) is not scored, which is logged once.
            batch: Batch of this rank, for measures of Hessian products and of activations. The pass runs in evaluation
                mode.

        Raises:
            SettingsError: An argument that the measure needs is missing, or no layer has a gradient.
        """
        measure = self.measure
        if measure.needs_own_pass:
            if batch is None:
                raise SettingsError(f"Tracker: measure '{measure.name}' needs the `batch`, got None.")
        elif measure.needs_gradients and gradients is None:
            raise SettingsError(f"Tracker: measure '{measure.name}' needs `gradients`, got None.")

        with scoring_mode(model):
            layers = find_layers(model, self.graph)
            if not self.has_logged:
                log_layers_without_norm(layers, measure.reads, measure.name)
                if measure.needs_hessian:
                    log.warning("Tracking '%s' costs a Hessian-gradient product a tracked step.", measure.name)

            # The statistic of this batch.
            flows: dict[str, Tensor] | None = None
            if isinstance(measure, ActivationImportance):
                ranks = Ranks(self._reduce)
                flows = mean_activation_scores(model, layers, measure, [batch], self._forward, ranks)
                layers = [layer for layer in layers if layer.name in flows]
            elif measure.needs_hessian:
                flows = self._hessian_rows(model, layers, batch)
            elif gradients is not None and measure.needs_gradients:
                layers, flows = self._gradient_rows(layers, gradients)

            # The scores of this batch, and the average.
            device = layers[0].tensors("weight")[0].value.device
            generator = private_generator(measure, device, self.seed)
            new = self._formula.vectors(layers, layer_values(layers, measure), flows, generator)
        self._running = exponential_average(self._running, new, self.alpha)
        self.num_updates += 1
        self.has_logged = True

    def _gradient_rows(
        self, layers: list[ScoredLayer], gradients: Mapping[str, Tensor | None]
    ) -> tuple[list[ScoredLayer], dict[str, Tensor]]:
        """Return the layers that have gradients, and these gradients (or their squares) as rows by layer name."""
        given = {name: gradient.detach() for name, gradient in gradients.items() if gradient is not None}
        scored = [layer for layer in layers if all(ref.name in given for ref in layer.tensors(self.measure.reads))]
        missing = [layer.name for layer in layers if layer not in scored]
        if not scored:
            raise SettingsError(f"Tracker: none of the layers has a gradient ({', '.join(missing[:3])}, ...).")
        if missing and not self.has_logged:
            log.warning(
                "Layers whose weights get no gradient in training (they are frozen, or derived where the derivation "
                "cannot be observed) are not scored; a group without a scored layer is kept whole: %s.",
                ", ".join(missing),
            )
        wanted = [ref.name for ref in unique_refs(scored, self.measure.reads)]
        wide = {name: given[name].to(accumulator_dtype(given[name])) for name in wanted}
        flows = layer_rows(scored, self.measure, wide)
        if self.measure.statistic == "squared_gradient":
            flows = {name: row.square() for name, row in flows.items()}
        return scored, flows

    def _hessian_rows(self, model: nn.Module, layers: list[ScoredLayer], batch: Batch) -> dict[str, Tensor]:
        """Return the Hessian-gradient products of a batch as rows by layer name."""
        refs = unique_refs(layers, self.measure.reads)
        with second_order_kernels():
            examples = to_device(batch, refs[0].value.device)
            if self._hessian_products is None or self._hessian_products.model is not model:
                self._hessian_products = HessianProducts(model, layers, refs, self._loss, examples)
            products = self._hessian_products.compute([examples], Ranks(self._reduce))
            return layer_rows(layers, self.measure, products)

    def scores(self) -> Scores:
        """Return the average so far.

        Raises:
            SettingsError: There was no update yet, or a score is not finite.
        """
        if not self._running:
            raise SettingsError("Tracker: no batch was tracked since the start or the last reset.")
        return Scores(self._running, measure=self.measure.name)

    def reset(self) -> None:
        """Discard the average, as after every round."""
        self._running = {}
        self._hessian_products = None
        self.num_updates = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average as plain tensors: "num_updates", and "scores.<layer>" for every layer."""
        state = {f"scores.{name}": vector.clone() for name, vector in self._running.items()}
        return {"num_updates": torch.tensor(self.num_updates), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved average.

        Raises:
            SettingsError: The state is not that of a tracker.
        """
        unknown = [name for name in state if name != "num_updates" and not name.startswith("scores.")]
        if "num_updates" not in state or unknown:
            raise SettingsError(
                f"Tracker: a saved state holds 'num_updates' and 'scores.<layer>', got {sorted(state)[:5]}."
            )
        self.num_updates = int(state["num_updates"])
        self._running = {
            name.removeprefix("scores."): vector.clone() for name, vector in state.items() if name != "num_updates"
        }

"""`score_filters`: an importance score for every filter of every conv, transposed conv and linear layer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gflow_pl.common.errors import SettingsError
from gflow_pl.importance.activations import forward_function, mean_activation_scores
from gflow_pl.importance.base import ActivationImportance, Importance
from gflow_pl.importance.batches import (
    Batch,
    balanced_sample,
    checked_labels,
    first_batch,
    first_example,
    labels_of,
    take_whole,
    to_device,
)
from gflow_pl.importance.first_order import averaged_scores, mean_gradients, mean_squared_rows
from gflow_pl.importance.formula import FilterFormula, layer_rows, layer_values
from gflow_pl.importance.gradients import LogitsFn, LossFn, batch_gradients, logits_and_labels, loss_function
from gflow_pl.importance.hessian import HessianProducts, second_order_kernels
from gflow_pl.importance.layers import find_layers, log_layers_without_norm, unique_refs
from gflow_pl.importance.measures import resolve_measure
from gflow_pl.importance.reduction import Ranks, Reduce
from gflow_pl.importance.scoring_mode import scoring_mode
from gflow_pl.values import ChannelGraph, Scores
from gflow_pl.values.choices import Bias

__all__ = ["checked_temperature", "private_generator", "score_filters"]

log = logging.getLogger(__name__)


def score_filters(
    model: nn.Module,
    measure: str | Importance,
    batches: Iterable[Batch] | None = None,
    *,
    graph: ChannelGraph | None = None,
    loss_fn: LossFn | None = None,
    temperature: float | None = None,
    num_samples: int | None = None,
    initial_state: Mapping[str, Tensor] | None = None,
    bias: Bias | None = None,
    logits_fn: LogitsFn | None = None,
    balanced: bool = True,
    reduce: Reduce | None = None,
    seed: int = 0,
) -> Scores:
    """Score every filter of a model; a higher score means keep.

    Scores are taken in evaluation mode, without autocast. The model does not change: training flags, ``requires_grad``,
    ``.grad``, running statistics and the random generators are restored. A frozen weight is scored like any other, a
    tied weight in each of its layers by its whole gradient, and a parametrized weight by its derived value.

    Args:
        model: Any module, a LightningModule or a plain one.
        measure: Name of a measure, or an `Importance`.
        batches: Iterable of (inputs, targets), or of the batches that `loss_fn` takes. Ignored by measures of weights.
        graph: Graph that names the norm behind each layer, and the weights that modules use themselves (with
            `torch.nn.functional.linear`, say). Without it, the norm of a layer is the next one of its width that is
            registered in the same parent module, and only convolutions and linear layers of torch are scored.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss. It is used unchanged, without a temperature.
        temperature: Divisor of the logits, > 0. None: the measure's own (200 for grasp, 1 for others).
        num_samples: Number of images of each rank to score on: whole batches until they contain that many, or, for a
            measure of Hessian products, the first ``num_samples // classes`` images of every class. None: all batches,
            of which a balanced sample takes as many images of every class as the smallest class has.
        initial_state: Initial weights by state-dict name, for the bias "distance_from_init".
        bias: Factor on the contribution of each weight to its filter, for measures of gradients: "none", "magnitude"
            (|theta|) or "distance_from_init" (|theta - theta_0|). None: "distance_from_init" if `initial_state` is
            given, else the measure's own.
        logits_fn: ``logits_fn(model, batch)`` returns (logits, labels). None: ``model(batch[0])`` and ``batch[1]``.
        balanced: Whether a measure of Hessian products takes equally many images of every class, if ``batch[1]`` holds
            integer labels.
        reduce: Averages a tensor over the ranks, out of place. All ranks must give the same number of batches, of the
            same sizes; their k-th batches count as one batch.
        seed: Seed of the private generator of `random`.

    Returns:
        One vector (filters,) for each layer, by name in the order of ``named_modules()``, then those of weights that
        modules use themselves; on the device of the model, in float32 (float64 for float64 weights).

    Raises:
        SettingsError: The measure is unknown, a number is out of range, a class has too few images, the loss is not
            finite, or the model lacks the derivatives that the measure needs.

    >>> model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2, 4))
    >>> [(name, tuple(scores.shape)) for name, scores in score_filters(model, "magnitude").items()]
    [('0', (2,)), ('2', (4,))]
    """
    measure = resolve_measure(measure)
    temperature = checked_temperature(measure, temperature)
    if num_samples is not None and num_samples < 1:
        raise SettingsError(f"score_filters: `num_samples` is a number of images, at least 1, got {num_samples}.")
    if measure.needs_batches and batches is None:
        raise SettingsError(f"score_filters: measure '{measure.name}' needs `batches`, got None.")
    formula = FilterFormula(measure, bias, initial_state)
    loss = loss_function(loss_fn, logits_fn, temperature)
    ranks = Ranks(reduce)

    # Evaluation mode comes first: in training mode, reading the weight of a spectral norm would update its buffers.
    with scoring_mode(model):
        layers = find_layers(model, graph)
        log_layers_without_norm(layers, measure.reads, measure.name)
        refs = unique_refs(layers, measure.reads)
        device = refs[0].value.device
        flows: dict[str, Tensor] | None = None

        # The statistic of the measure, from passes over the batches.
        if measure.needs_hessian:
            assert batches is not None
            with second_order_kernels():
                first, batches = first_batch(batches)
                num_classes = _num_classes(model, first, logits_fn, loss_fn, device) if balanced else None
                products = HessianProducts(model, layers, refs, loss, to_device(first, device))
                if num_classes is None:
                    sample = list(take_whole(batches, num_samples))
                else:
                    sample = balanced_sample(batches, num_samples, num_classes, ranks, device)
                flows = layer_rows(layers, measure, products.compute(sample, ranks))
        elif measure.needs_gradients:
            assert batches is not None
            gradients = batch_gradients(model, refs, take_whole(batches, num_samples), loss, device)
            if measure.is_tracked:
                return Scores(averaged_scores(gradients, refs, ranks, formula, layers), measure=measure.name)
            if measure.statistic == "squared_gradient":
                flows = mean_squared_rows(gradients, refs, ranks, formula, layers)
            else:
                flows = layer_rows(layers, measure, mean_gradients(gradients, refs, ranks))
        elif isinstance(measure, ActivationImportance):
            assert batches is not None
            stream = take_whole(batches, num_samples)
            forward = forward_function(loss_fn, logits_fn)
            flows = mean_activation_scores(model, layers, measure, stream, forward, ranks)
            layers = [layer for layer in layers if layer.name in flows]

        # The formula of the measure.
        vectors = formula.vectors(
            layers, layer_values(layers, measure), flows, private_generator(measure, device, seed)
        )
        return Scores(vectors, measure=measure.name)


def private_generator(measure: Importance, device: torch.device, seed: int) -> torch.Generator | None:
    """Return a seeded generator for a measure whose statistic is "noise"; None for any other measure.

    It gives the same numbers on every rank. The global generators are not used.
    """
    return torch.Generator(device).manual_seed(seed) if measure.statistic == "noise" else None


def checked_temperature(measure: Importance, temperature: float | None) -> float:
    """Return the given temperature, or the measure's own, or 1.

    Raises:
        SettingsError: The temperature is not above zero.
    """
    if temperature is None:
        return 1.0 if measure.temperature is None else measure.temperature
    if not temperature > 0:
        raise SettingsError(f"score_filters: `temperature` divides the logits and must be > 0, got {temperature}.")
    return temperature


def _num_classes(
    model: nn.Module, batch: Batch, logits_fn: LogitsFn | None, loss_fn: LossFn | None, device: torch.device
) -> int | None:
    """Return the number of classes: the width of the logits of one example. None, which is logged, without labels."""
    labels = labels_of(batch)
    reason = "`batch[1]` is no vector of integer labels"
    if labels is not None:
        try:
            with torch.no_grad():
                logits, _ = (logits_fn or logits_and_labels)(model, to_device(first_example(batch), device))
        except Exception:
            # With a custom loss, the forward of the model may take arguments of any kind.
            if loss_fn is None:
                raise
            logits = None
        if isinstance(logits, Tensor) and logits.ndim == 2 and logits.is_floating_point():
            checked_labels(labels, logits.shape[1])
            return logits.shape[1]
        reason = "the model gives no logits (examples, classes)"
    log.info("Samples are not balanced over classes, since %s: whole batches are used.", reason)
    return None

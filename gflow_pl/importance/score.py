"""`score_filters`: a score for every filter of every conv, transposed conv and linear layer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gflow_pl.common.nested import map_tensors
from gflow_pl.importance.base import Bias, Importance
from gflow_pl.importance.batches import (
    balanced_sample,
    checked_labels,
    labels_of,
    peek,
    take_whole,
    to_device,
)
from gflow_pl.importance.formula import FilterFormula, rows_of, step_average, values_of
from gflow_pl.importance.gradients import (
    LogitsFn,
    LossFn,
    accumulator_dtype,
    batch_gradients,
    logits_and_labels,
    loss_function,
)
from gflow_pl.importance.hessian import HessianProducts, second_order_kernels
from gflow_pl.importance.layers import (
    ScoredLayer,
    TensorRef,
    find_layers,
    say_what_stands_in,
    unique_refs,
)
from gflow_pl.importance.measures import resolve_measure
from gflow_pl.importance.reduction import Ranks, Reduce
from gflow_pl.importance.scoring_mode import scoring_mode
from gflow_pl.values import ChannelGraph, Scores

__all__ = ["checked_temperature", "private_generator", "score_filters"]

log = logging.getLogger(__name__)


def score_filters(
    model: nn.Module,
    measure: str | Importance,
    batches: Iterable[Any] | None = None,
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
    autocast_dtype: torch.dtype | None = None,
) -> Scores:
    """Score every filter of a model; higher = keep.

    Scores are taken in evaluation mode. Nothing of the model changes: training flags, ``requires_grad``, ``.grad``,
    running statistics and the random generators are afterwards what they were. A frozen weight is scored like any
    other, a tied one in each of its layers by its whole gradient, a parametrized one as the weight it computes.

    Args:
        model: Any module, a LightningModule or a plain one.
        measure: A name or an `Importance`.
        batches: Iterable of (inputs, targets), or of whatever `loss_fn` takes. Not read by measures that need no gradient.
        graph: A `ChannelGraph`, which pairs norms with layers. Without it a layer's norm is the next one registered in
            the same parent with its width.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss and is used as it is, without temperature.
        temperature: Divides the logits, > 0; None: the measure's own (grasp 200, others 1).
        num_samples: Images to score on (of each rank): whole batches until they are reached, or, for measures that
            need Hessian products, the first num_samples // classes images of every class. None: all batches;
            balanced then is as many as the smallest class has.
        initial_state: Initial weights by state-dict name, for the bias "distance_from_init".
        bias: Multiplies each weight's term before the sum over the filter, for gradient measures: "none", "magnitude"
            (|theta|) or "distance_from_init" (|theta - theta_0|). None: "distance_from_init" where `initial_state`
            is given, else the measure's own.
        logits_fn: ``logits_fn(model, batch)`` returns (logits, labels); None: model(batch[0]) and batch[1].
        balanced: Whether measures that need Hessian products draw the same number of images from every class, if
            ``batch[1]`` are integer labels.
        reduce: Averages a tensor over the ranks, out of place. All ranks give the same number of batches of the same
            sizes; the k-th batches of all ranks are one batch.
        seed: Of the private generator of `random`.
        autocast_dtype: Runs first-order passes under autocast; None: autocast is off, whatever is around.

    Returns:
        One vector (filters,) a layer, by name, in the order of ``named_modules()``, in float32 (float64 for float64
        weights), on the model's device.

    Raises:
        ValueError: An unknown name, a number out of range, too few images of a class, a loss that is not
            finite, or a model without the derivatives that the measure needs.

    >>> model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2, 4))
    >>> [(name, tuple(scores.shape)) for name, scores in score_filters(model, "magnitude").items()]
    [('0', (2,)), ('2', (4,))]
    """
    measure = resolve_measure(measure)
    temperature = checked_temperature(measure, temperature)
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"score_filters: `num_samples` is a number of images, at least 1, got {num_samples}.")
    formula = FilterFormula(measure, bias, initial_state)
    loss = loss_function(loss_fn, logits_fn, temperature)
    # Only what reads a weight in evaluation mode leaves a spectral norm as it is: the mode is set before anything else.
    with scoring_mode(model, autocast_dtype=None if measure.needs_hessian else autocast_dtype):
        layers = find_layers(model, graph)
        say_what_stands_in(layers, measure.reads, measure.name)
        if not measure.needs_gradients:
            return formula.scores(layers, values_of(layers, measure), None, private_generator(layers, seed))
        if batches is None:
            raise ValueError(f"score_filters: measure '{measure.name}' needs `batches`, got None.")
        refs = unique_refs(layers, measure.reads)
        ranks = Ranks(reduce)
        if measure.needs_hessian:
            with second_order_kernels():
                first, batches = peek(batches)
                device = refs[0].value.device
                classes = _num_classes(model, first, logits_fn, loss_fn, device) if balanced else None
                products = HessianProducts(model, layers, refs, loss, to_device(first, device))
                if classes is None:
                    sample = list(take_whole(batches, num_samples))
                else:
                    sample = balanced_sample(batches, num_samples, classes, ranks, device)
                flows = rows_of(layers, measure, products.of(sample, ranks))
            return formula.scores(layers, values_of(layers, measure), flows)
        stream = batch_gradients(model, refs, take_whole(batches, num_samples), loss, refs[0].value.device)
        if measure.is_tracked:
            return _averaged(stream, formula, layers, refs, ranks)
        if measure.statistic == "squared_gradient":
            flows = _mean_square_rows(stream, layers, measure, refs, ranks)
        else:
            flows = rows_of(layers, measure, _mean_gradients(stream, refs, ranks))
        return formula.scores(layers, values_of(layers, measure), flows)


def private_generator(layers: list[ScoredLayer], seed: int) -> torch.Generator:
    """A seeded generator on the layers' device: equal on all ranks, and no other generator is touched."""
    return torch.Generator(layers[0].tensors("weight")[0].value.device).manual_seed(seed)


def checked_temperature(measure: Importance, temperature: float | None) -> float:
    """The temperature asked for, else the measure's own, else 1.

    Raises:
        ValueError: It is not above zero.
    """
    if temperature is None:
        return 1.0 if measure.temperature is None else measure.temperature
    if not temperature > 0:
        raise ValueError(f"score_filters: `temperature` divides the logits and must be > 0, got {temperature}.")
    return temperature


def _mean_gradients(
    stream: Iterator[tuple[int, list[Tensor]]], refs: list[TensorRef], ranks: Ranks
) -> dict[str, Tensor]:
    """The gradient of the mean loss over all examples, by tensor name."""
    sums: list[Tensor] = []
    count = 0
    for size, gradients in stream:
        if not sums:
            sums = [gradient.to(accumulator_dtype(gradient), copy=True).mul_(size) for gradient in gradients]
        else:
            torch._foreach_add_(sums, gradients, alpha=size)
        count += size
    return dict(zip((ref.name for ref in refs), ranks.weighted_mean(sums, count), strict=True))


def _global_batch(gradients: list[Tensor], size: int, refs: list[TensorRef], ranks: Ranks) -> dict[str, Tensor]:
    """The gradient of the mean loss over the batches of all ranks, by tensor name."""
    wide = [gradient.to(accumulator_dtype(gradient)) for gradient in gradients]
    if ranks.reduce is not None:
        wide = ranks.weighted_mean([gradient * size for gradient in wide], size)
    return dict(zip((ref.name for ref in refs), wide, strict=True))


def _mean_square_rows(
    stream: Iterator[tuple[int, list[Tensor]]],
    layers: list[ScoredLayer],
    measure: Importance,
    refs: list[TensorRef],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """The mean over batches, weighted by their sizes, of the squared gradient of a batch, in rows."""
    sums: dict[str, Tensor] = {}
    count = 0
    for size, gradients in stream:
        for name, row in rows_of(layers, measure, _global_batch(gradients, size, refs, ranks)).items():
            if name in sums:
                sums[name].addcmul_(row, row, value=size)
            else:
                sums[name] = row.square() * size
        count += size
    return {name: total / count for name, total in sums.items()}


def _averaged(
    stream: Iterator[tuple[int, list[Tensor]]],
    formula: FilterFormula,
    layers: list[ScoredLayer],
    refs: list[TensorRef],
    ranks: Ranks,
) -> Scores:
    """The exponential average over batches of a measure that is defined by it."""
    measure = formula.measure
    values = values_of(layers, measure)
    running: dict[str, Tensor] = {}
    for size, gradients in stream:
        flows = rows_of(layers, measure, _global_batch(gradients, size, refs, ranks))
        running = step_average(running, formula.vectors(layers, values, flows), measure.alpha)
    return Scores(running, measure=measure.name)


def _num_classes(
    model: nn.Module, batch: Any, logits_fn: LogitsFn | None, loss_fn: LossFn | None, device: torch.device
) -> int | None:
    """Classes of a classifier, the width of its logits for one example; None (and said) where there are no labels."""
    labels = labels_of(batch)
    why = "`batch[1]` is no vector of integer labels"
    if labels is not None:
        one = to_device(map_tensors(batch, lambda t: t[:1] if t.ndim and len(t) == len(labels) else t), device)
        try:
            with torch.no_grad():
                logits, _ = (logits_fn or logits_and_labels)(model, one)
        except Exception:
            # With a loss function of its own a model's forward may want anything at all.
            if loss_fn is None:
                raise
            logits = None
        if isinstance(logits, Tensor) and logits.ndim == 2 and logits.is_floating_point():
            checked_labels(labels, logits.shape[1])
            return logits.shape[1]
        why = "the model gives no logits (examples, classes)"
    log.info("Samples are not balanced over classes, since %s: whole batches are used.", why)
    return None

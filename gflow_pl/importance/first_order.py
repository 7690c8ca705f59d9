"""Statistics of first order, accumulated over the gradients of batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gflow_pl.importance.formula import FilterFormula, exponential_average, layer_rows, layer_values
from gflow_pl.importance.gradients import accumulator_dtype
from gflow_pl.importance.layers import ScoredLayer, TensorRef
from gflow_pl.importance.reduction import Ranks

__all__ = ["Gradients", "averaged_scores", "mean_gradients", "mean_squared_rows"]

Gradients = Iterator[tuple[int, list[Tensor]]]
"""Of every batch, the number of examples and the gradients of its mean loss; see `batch_gradients`."""


def mean_gradients(stream: Gradients, refs: list[TensorRef], ranks: Ranks) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over the examples of all ranks, by tensor name."""
    sums: list[Tensor] = []
    count = 0
    for size, gradients in stream:
        if not sums:
            sums = [gradient.to(accumulator_dtype(gradient), copy=True).mul_(size) for gradient in gradients]
        else:
            torch._foreach_add_(sums, gradients, alpha=size)
        count += size
    return dict(zip((ref.name for ref in refs), ranks.weighted_mean(sums, count), strict=True))


def mean_squared_rows(
    stream: Gradients, refs: list[TensorRef], ranks: Ranks, formula: FilterFormula, layers: list[ScoredLayer]
) -> dict[str, Tensor]:
    """Return the size-weighted mean over batches of a global batch's squared gradient, in rows by layer name."""
    sums: dict[str, Tensor] = {}
    count = 0
    for size, gradients in stream:
        for name, row in layer_rows(layers, formula.measure, _global_batch(gradients, size, refs, ranks)).items():
            if name in sums:
                sums[name].addcmul_(row, row, value=size)
            else:
                sums[name] = row.square() * size
        count += size
    return {name: total / count for name, total in sums.items()}


def averaged_scores(
    stream: Gradients, refs: list[TensorRef], ranks: Ranks, formula: FilterFormula, layers: list[ScoredLayer]
) -> dict[str, Tensor]:
    """Return the exponential average over batches of the scores of a global batch, by layer name."""
    values = layer_values(layers, formula.measure)
    running: dict[str, Tensor] = {}
    for size, gradients in stream:
        flows = layer_rows(layers, formula.measure, _global_batch(gradients, size, refs, ranks))
        running = exponential_average(running, formula.vectors(layers, values, flows), formula.measure.alpha)
    return running


def _global_batch(gradients: list[Tensor], size: int, refs: list[TensorRef], ranks: Ranks) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over the batches of all ranks, by tensor name."""
    wide = [gradient.to(accumulator_dtype(gradient)) for gradient in gradients]
    if ranks.reduce is not None:
        wide = ranks.weighted_mean([gradient * size for gradient in wide], size)
    return dict(zip((ref.name for ref in refs), wide, strict=True))

"""The tensors of a scored layer as rows: one row for each filter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from gflow_pl.importance.layers import Reads, ScoredLayer

__all__ = ["gradient_rows", "weight_rows"]


def _filter_rows(layer: ScoredLayer, weight: Tensor) -> Tensor:
    """Return a weight, or a tensor of its shape, as (filters, weights of one filter)."""
    if layer.use is not None:
        return weight.movedim(layer.use.dim, 0).flatten(1)
    if not isinstance(layer.module, _ConvTransposeNd):
        return weight.flatten(1)
    # The weight of a transposed convolution is (inputs, outputs of one group, ...), group by group.
    groups = layer.module.groups
    inputs, outputs, *kernel = weight.shape
    size = inputs // groups * torch.Size(kernel).numel()
    return weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2).reshape(groups * outputs, size)


def weight_rows(layer: ScoredLayer, reads: Reads, values: Mapping[str, Tensor]) -> Tensor:
    """Return the tensors that a measure reads of one layer as rows, (filters, weights of one filter).

    Args:
        layer: The layer.
        reads: "weight", or "norm" for weight and bias of the norm (1 and 0 if there is none).
        values: Tensors by the names of ``layer.tensors(reads)``.
    """
    found = [values[ref.name] for ref in layer.tensors(reads)]
    if reads == "weight":
        return _filter_rows(layer, found[0])
    if layer.norm is None:
        ones = found[0].new_ones(layer.num_filters)
        return torch.stack([ones, torch.zeros_like(ones)], dim=1)
    return torch.stack(found, dim=1)


def gradient_rows(
    layer: ScoredLayer, reads: Reads, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> Tensor:
    """Return gradients of one layer, or tensors that are linear in them, in the rows of `weight_rows`.

    A missing norm would scale and shift the outputs of the layer. Its weight, at 1, has the gradient
    ``sum(w g) + b g_b``, and its bias, at 0, the gradient ``g_b``.

    Args:
        layer: The layer.
        reads: As in `weight_rows`.
        values: Tensors by the names of ``layer.tensors(reads)``.
        gradients: Their gradients by the same names.
    """
    refs = layer.tensors(reads)
    found = [gradients[ref.name] for ref in refs]
    if reads == "weight":
        return _filter_rows(layer, found[0])
    if layer.norm is not None:
        return torch.stack(found, dim=1)
    scale = (_filter_rows(layer, values[refs[0].name]) * _filter_rows(layer, found[0])).sum(1)
    shift = found[1] if len(found) > 1 else torch.zeros_like(scale)
    if len(found) > 1:
        scale = scale + values[refs[1].name] * shift
    return torch.stack([scale, shift], dim=1)

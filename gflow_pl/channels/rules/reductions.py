"""Rules of operators that reduce a dimension or mix its positions: sums, means, softmax, sorting, pooling."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["NORM_OF_WEIGHT", "REDUCTION_RULES"]

NORM_OF_WEIGHT = "a norm of a computed weight over the pruned dim"
"""Reason of units that a weight is normalized over: its norm changes, even if the removed channels are zero."""

_SUMS = frozenset(["sum", "linalg_vector_norm", "norm", "count_nonzero"])
"""Reductions that zeros do not change, so that channels that are zero once removed may go."""

_MEANS = frozenset(["mean", "var", "std", "var_mean", "std_mean", "logsumexp", "amax", "amin", "max", "min", "aminmax"])
"""Reductions whose result changes if positions go, even if these hold zeros."""

_OF_ZEROS_ZERO = frozenset(["sum", "mean", "amax", "amin"])
"""Reductions of zeros that are zero."""


def _reduced_dims(op: OperatorCall, position: int, ndim: int) -> tuple[int, ...]:
    """Return the dimensions that a reduction removes: those in the argument `dim`, all if it is not given.

    Args:
        op: The call.
        position: Position of the argument `dim`.
        ndim: Number of dimensions of the operand.
    """
    dims: Any = op.kwargs.get("dim", op.args[position] if position < len(op.args) else None)
    if dims is None or isinstance(dims, bool) or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(ndim))
    return tuple(dim % ndim for dim in (dims if isinstance(dims, (list, tuple)) else (dims,)))


def _reduce(op: OperatorCall) -> None:
    """Label the outputs of ``sum(x, dim, keepdim)``, mean, var, norm, amax, argmax, any and others.

    Over channels, a sum of zeros is exact; other sums, means, maxima and minima are inexact, and anything else freezes
    the channels.
    """
    x = op.operands[0]
    info = op.info(x)
    position = 2 if op.name in ("linalg_vector_norm", "norm") else 1
    reduced = _reduced_dims(op, position, x.ndim) if x.ndim else ()
    for dim in reduced:
        labels = info.labels[dim]
        if labels is not None and op.name in _SUMS and _is_weight(op, x, reduced):
            op.mark_inexact(labels, NORM_OF_WEIGHT)
            continue
        if labels is None or (op.name in _SUMS and dim in info.zero_dims):
            continue
        if op.name in _SUMS | _MEANS:
            op.mark_inexact(labels, f"'{op.name}' over the pruned dim")
        else:
            op.freeze(labels, f"'{op.name}' over the channels")

    stays_zero = op.name in _OF_ZEROS_ZERO
    remaining = [dim for dim in range(x.ndim) if dim not in reduced]
    for output in op.outputs:
        if output.ndim == x.ndim:  # keepdim
            all_labels: DimLabels = [None if dim in reduced else vector for dim, vector in enumerate(info.labels)]
            op.set_labels(output, all_labels, (info.zero_dims - set(reduced)) if stays_zero else ())
        else:
            zero_dims = [i for i, dim in enumerate(remaining) if dim in info.zero_dims and stays_zero]
            op.set_labels(output, [info.labels[dim] for dim in remaining][: output.ndim], zero_dims)


def _is_weight(op: OperatorCall, x: Tensor, reduced: Collection[int]) -> bool:
    """Return whether an operand is a computed weight, whose norm stays when an activation becomes zero.

    It depends on no input, or (a weight that is modulated by one) it has channels that are read and channels that are
    written.
    """
    info = op.info(x)
    labelled = [dim for dim, labels in enumerate(info.labels) if labels is not None and len(labels) > 1]
    return not info.is_activation or any(dim not in reduced for dim in labelled)


def _unpool(op: OperatorCall) -> None:
    """Label the output of ``max_unpool2d(x, indices, size)``; the indices have the channels of x."""
    x, indices = op.operands[:2]
    info = op.info(x)
    first = x.ndim - int(next(char for char in op.name if char.isdigit()))
    for dim in range(x.ndim):
        if dim < first:
            op.match(info.labels[dim], op.info(indices).labels[dim], "indices of other channels")
        else:
            op.freeze(info.labels[dim], "a spatial dim of a pooling or resizing op")
    op.set_labels(
        op.output, [*info.labels[:first], *[None] * (x.ndim - first)], {d for d in info.zero_dims if d < first}
    )


def _mix_along(op: OperatorCall) -> None:
    """Label the output of ``softmax(x, dim)``, ``cumsum(x, dim)`` and others.

    Every position along the dimension depends on others, so that the removal of some is inexact.
    """
    x = op.operands[0]
    info = op.info(x)
    dim = op.arg(1, "dim") % x.ndim
    op.mark_inexact(info.labels[dim], f"'{op.name.strip('_')}' along the pruned dim")
    for output in op.outputs:
        op.set_labels(output, info.labels, info.zero_dims - {dim} if op.name == "cumsum" else ())


def _sort(op: OperatorCall) -> None:
    """Label the outputs of ``sort(x, dim)``, ``topk(x, k, dim)``, ``median(x, dim)`` and others.

    Which positions are returned depends on values, so that channels are frozen.
    """
    x = op.operands[0]
    info = op.info(x)
    position = 2 if op.name == "topk" else 1
    dim = op.arg(position, "dim", -1)
    dim = (dim if isinstance(dim, int) and not isinstance(dim, bool) else -1) % max(x.ndim, 1)
    op.freeze(info.labels[dim], f"'{op.name}' over the channels")
    for output in op.outputs:
        op.set_labels(output, [None if i == dim else vector for i, vector in enumerate(info.labels)])


def _pool(op: OperatorCall) -> None:
    """Label the outputs of pooling and resizing.

    Examples and channels are independent of each other; the spatial dimensions behind them are frozen. The number of
    spatial dimensions is part of the operator's name: 2 for ``max_pool2d``.
    """
    x = op.operands[0]
    info = op.info(x)
    digits = [int(char) for char in op.name if char.isdigit()]
    num_spatial = digits[0] if digits else max(x.ndim - 2, 1)
    first = x.ndim - num_spatial
    for dim in range(first, x.ndim):
        op.freeze(info.labels[dim], "a spatial dim of a pooling or resizing op")
    zero_dims = [dim for dim in info.zero_dims if dim < first]
    for output in op.outputs:
        op.set_labels(output, [*info.labels[:first], *[None] * num_spatial], zero_dims, info.is_uniform)


_NAMES: dict[Rule, str] = {
    _reduce: """sum mean var std var_mean std_mean linalg_vector_norm norm amax amin max min argmax argmin prod any all
        logsumexp count_nonzero aminmax""",
    _mix_along: "_softmax softmax _log_softmax log_softmax _safe_softmax cumsum cumprod logcumsumexp",
    _unpool: "max_unpool2d max_unpool3d",
    _sort: "sort topk argsort kthvalue median mode msort",
    _pool: """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
        avg_pool3d _adaptive_avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d
        adaptive_max_pool2d adaptive_max_pool3d mkldnn_max_pool2d quantized_max_pool2d fractional_max_pool2d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d upsample_linear1d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa""",
}
REDUCTION_RULES = rule_table(_NAMES)

"""Rules of operators that reorder, add, drop or repeat dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["DIMENSION_RULES"]

_ONE_INDEX = "one index of the channels is read"


def _set_reordered(op: OperatorCall, output: Tensor, order: Sequence[int]) -> None:
    """Label an output whose dimension i is dimension ``order[i]`` of the first operand."""
    info = op.info(op.operands[0])
    zero_dims = [i for i, dim in enumerate(order) if dim in info.zero_dims]
    op.set_labels(output, [info.labels[dim] for dim in order], zero_dims, info.is_uniform)


def _set_without(op: OperatorCall, output: Tensor, dropped: set[int], reason: str) -> None:
    """Label an output that lacks some dimensions of the first operand, and freeze the labels of these dimensions."""
    x = op.operands[0]
    for dim in dropped:
        op.freeze(op.info(x).labels[dim], reason)
    _set_reordered(op, output, [dim for dim in range(x.ndim) if dim not in dropped])


def _permute(op: OperatorCall) -> None:
    """Label the output of ``permute(x, dims)``."""
    ndim = op.operands[0].ndim
    _set_reordered(op, op.output, [dim % ndim for dim in op.args[1]])


def _transpose(op: OperatorCall) -> None:
    """Label the output of ``transpose(x, dim0, dim1)`` and ``t(x)``."""
    order = list(range(op.operands[0].ndim))
    a, b = (op.arg(1, "dim0"), op.arg(2, "dim1")) if op.name.startswith("transpose") else (0, len(order) - 1)
    if order:
        order[a], order[b] = order[b], order[a]
    _set_reordered(op, op.output, order)


def _unsqueeze(op: OperatorCall) -> None:
    """Label the output of ``unsqueeze(x, dim)``."""
    info = op.info(op.operands[0])
    new = op.arg(1, "dim") % op.output.ndim
    labels: DimLabels = [*info.labels[:new], None, *info.labels[new:]]
    op.set_labels(op.output, labels, [dim + (dim >= new) for dim in info.zero_dims], info.is_uniform)


def _squeeze(op: OperatorCall) -> None:
    """Label the output of ``squeeze(x)``, ``squeeze(x, dim)`` and ``squeeze(x, dims)``.

    A single channel that is squeezed away stays single.
    """
    x = op.operands[0]
    given = op.arg(1, "dim")
    dims = range(x.ndim) if given is None else given if isinstance(given, (list, tuple)) else [given]
    _set_without(op, op.output, {dim % x.ndim for dim in dims if x.shape[dim] == 1}, "a single channel")


def _select(op: OperatorCall) -> None:
    """Label the output of ``select(x, dim, index)``."""
    _set_without(op, op.output, {op.arg(1, "dim") % op.operands[0].ndim}, _ONE_INDEX)


def _unbind(op: OperatorCall) -> None:
    """Label the outputs of ``unbind(x, dim=0)``."""
    for output in op.outputs:
        _set_without(op, output, {op.arg(1, "dim", 0) % op.operands[0].ndim}, _ONE_INDEX)


def _expand(op: OperatorCall) -> None:
    """Label the output of ``expand(x, sizes)``.

    Dimensions are added in front, and dimensions of size 1 are broadcast. A broadcast dimension can have any size: it
    follows the channels that it meets, if its size in the code does.
    """
    x = op.operands[0]
    info = op.info(x)
    num_new = op.output.ndim - x.ndim
    labels: DimLabels = [op.broadcast_labels(size) for size in op.output.shape[:num_new]]
    for dim, vector in enumerate(info.labels):
        is_kept = x.shape[dim] == op.output.shape[dim + num_new]
        if not is_kept:
            op.freeze(vector, "a single channel that is broadcast to many")
        labels.append(vector if is_kept else op.broadcast_labels(op.output.shape[dim + num_new]))
    op.set_labels(op.output, labels, [dim + num_new for dim in info.zero_dims], info.is_uniform)


def _repeat(op: OperatorCall) -> None:
    """Label the output of ``repeat(x, repeats)``; all copies of a channel have its label."""
    x = op.operands[0]
    info = op.info(x)
    num_new = op.output.ndim - x.ndim
    labels: DimLabels = [None] * num_new
    for vector, times in zip(info.labels, op.args[1][num_new:], strict=True):
        labels.append(None if vector is None else np.tile(vector, times))
    op.set_labels(op.output, labels, [dim + num_new for dim in info.zero_dims], info.is_uniform)


def _flip(op: OperatorCall) -> None:
    """Label the output of ``flip(x, dims)``."""
    x = op.operands[0]
    info = op.info(x)
    flipped = {dim % x.ndim for dim in op.args[1]}
    labels = [v[::-1] if dim in flipped and v is not None else v for dim, v in enumerate(info.labels)]
    op.set_labels(op.output, labels, info.zero_dims, info.is_uniform)


def _roll(op: OperatorCall) -> None:
    """Label the output of ``roll(x, shifts, dims=())``.

    The shift is a fixed number of positions and would not follow a removed channel: all channels of a rolled dimension
    are frozen.
    """
    x = op.operands[0]
    info = op.info(x)
    for dim in {dim % x.ndim for dim in op.arg(2, "dims", ())} or set(range(x.ndim)):
        op.freeze(info.labels[dim], "channels are rolled")
    op.set_labels(op.output, info.labels, (), info.is_uniform)


_NAMES: dict[Rule, str] = {
    _permute: "permute",
    _transpose: "transpose t numpy_T",
    _unsqueeze: "unsqueeze",
    _squeeze: "squeeze",
    _select: "select",
    _unbind: "unbind",
    _expand: "expand broadcast_to",
    _repeat: "repeat",
    _flip: "flip",
    _roll: "roll",
}
DIMENSION_RULES = rule_table(_NAMES)

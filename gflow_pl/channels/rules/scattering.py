"""Rules of operators that add up rows at given positions, and of packed sequences: graph networks, recurrent layers."""

from __future__ import annotations

from torch import Tensor

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["SCATTERING_RULES"]

_POSITIONS = "positions that are looked up"
_TARGET = "is added to a tensor whose channels are not known"


def _index_add(op: OperatorCall) -> None:
    """Label the output of ``index_add(x, dim, index, source)`` and ``index_reduce``.

    The rows along `dim` are frozen; the other dimensions of x and the source have the same channels.
    """
    x, dim, index, source = op.args[0], op.args[1] % op.output.ndim, op.args[2], op.args[3]
    _freeze_all(op, index, _POSITIONS)
    _set_merged(op, x, source, dim)


def _scatter(op: OperatorCall) -> None:
    """Label the output of ``scatter_add(x, dim, index, source)``, scatter and scatter_reduce.

    The index has the shape of the source, so that it selects no part of it, or the channels are frozen.
    """
    x, dim, index = op.args[0], op.args[1] % op.output.ndim, op.args[2]
    source = op.args[3] if len(op.args) > 3 else op.kwargs.get("src", op.kwargs.get("value"))
    info = op.info(index)
    if not isinstance(source, Tensor) or index.shape != source.shape:
        for tensor in op.operands:
            _freeze_all(op, tensor, "channels are scattered")
        op.set_labels(op.output, [None] * op.output.ndim)
        return
    for other in range(op.output.ndim):
        if other == dim or index.shape[other] != op.output.shape[other]:
            for tensor in (x, source):
                op.freeze(op.info(tensor).labels[other], _POSITIONS)
            op.freeze(info.labels[other], _POSITIONS)
        elif info.labels[other] is not None:
            op.match(info.labels[other], op.info(source).labels[other], _POSITIONS)
    _set_merged(op, x, source, dim)


def _gather(op: OperatorCall) -> None:
    """Label the output of ``gather(x, dim, index)``, which has the shape of the index."""
    x, dim, index = op.args[0], op.args[1] % op.output.ndim, op.args[2]
    info, index_info = op.info(x), op.info(index)
    labels: DimLabels = []
    for other in range(op.output.ndim):
        vector = info.labels[other]
        if other == dim or index.shape[other] != x.shape[other]:
            op.freeze(vector, _POSITIONS)
            op.freeze(index_info.labels[other], _POSITIONS)
            vector = None
        elif index_info.labels[other] is not None:
            op.match(index_info.labels[other], vector, _POSITIONS)
        labels.append(vector)
    op.set_labels(op.output, labels, {d for d in info.zero_dims if labels[d] is not None})


def _sparse_product(op: OperatorCall) -> None:
    """Label the output of a sparse matrix times a dense one, with or without a third matrix that is added."""
    sparse, dense = op.args[-2:]
    _freeze_all(op, sparse, "a sparse matrix")
    op.freeze(op.info(dense).labels[0], "the rows that a sparse matrix reads")
    added = op.args[0] if len(op.args) == 3 else None
    labels = op.info(dense).labels[1]
    zero_dims = {1} & op.info(dense).zero_dims
    if added is not None and not op.info(added).is_uniform:
        op.match(labels, op.info(added).labels[-1], _TARGET)
        zero_dims &= op.info(added).zero_dims
    op.set_labels(op.output, [None, labels], zero_dims)


def _pack(op: OperatorCall) -> None:
    """Label the outputs of ``_pack_padded_sequence(x, lengths, batch_first)``: all steps in a row, and sizes."""
    info = op.info(op.args[0])
    for vector in info.labels[:2]:
        op.freeze(vector, "the steps of a sequence")
    packed, *rest = op.outputs
    op.set_labels(packed, [None, *info.labels[2:]], {dim - 1 for dim in info.zero_dims if dim > 1})
    for output in rest:
        op.set_labels(output, [None] * output.ndim)


def _freeze_all(op: OperatorCall, tensor: Tensor, reason: str) -> None:
    """Freeze all labels of a tensor."""
    for vector in op.info(tensor).labels:
        op.freeze(vector, reason)


def _set_merged(op: OperatorCall, x: Tensor, source: Tensor, dim: int) -> None:
    """Label an output in which rows of a source are added to rows of x.

    Args:
        op: The call.
        x: The tensor that is added to.
        source: The rows.
        dim: The dimension of the rows, which is frozen.
    """
    info, added = op.info(x), op.info(source)
    labels: list[Labels | None] = []
    for other in range(x.ndim):
        vector = added.labels[other]
        if other == dim or source.shape[other] != x.shape[other]:
            op.freeze(vector, _POSITIONS)
            op.freeze(info.labels[other], _POSITIONS)
            vector = None
        elif not info.is_uniform:
            op.match(vector, info.labels[other], _TARGET)
            vector = info.labels[other]
        labels.append(vector)
    op.set_labels(op.output, labels, () if info.is_uniform else info.zero_dims & added.zero_dims)


_NAMES: dict[Rule, str] = {
    _index_add: "index_add index_reduce",
    _scatter: "scatter_add scatter scatter_reduce",
    _gather: "gather",
    _sparse_product: "_sparse_addmm _sparse_mm _sparse_sparse_matmul",
    _pack: "_pack_padded_sequence",
}
SCATTERING_RULES = rule_table(_NAMES)

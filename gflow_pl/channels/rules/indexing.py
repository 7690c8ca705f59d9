"""Rules of operators that read or write positions given by a tensor."""

from __future__ import annotations

from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["INDEXING_RULES"]


def _index(op: OperatorCall) -> None:
    """Label the output of ``index(x, indices)``, which is ``x[i, :, j]``.

    The indexed dimensions are frozen, and the others keep their labels. The dimensions of the indices, broadcast
    against each other, replace the indexed dimensions if these are adjacent. Otherwise they come first.
    """
    x, indices = op.args[0], list(op.args[1])
    info = op.info(x)
    indexed = [dim for dim, index in enumerate(indices) if index is not None]
    for index in indices:
        for vector in op.info(index).labels if index is not None else ():
            op.freeze(vector, "positions that are looked up")
    for dim in indexed:
        op.freeze(info.labels[dim], "channels are picked by an index")

    # The dimension of x that each dimension of the output comes from; None for those of the indices.
    others = [dim for dim in range(x.ndim) if dim not in indexed]
    num_index_dims = op.output.ndim - len(others)
    are_adjacent = not indexed or indexed == list(range(indexed[0], indexed[0] + len(indexed)))
    front = [dim for dim in others if indexed and dim < indexed[0]] if are_adjacent else []
    back = [dim for dim in others if dim not in front]
    origin: list[int | None] = [*front, *[None] * num_index_dims, *back]
    if num_index_dims < 0 or len(origin) != op.output.ndim:  # a boolean mask of several dimensions
        for vector in info.labels:
            op.freeze(vector, "channels are picked by a mask")
        origin = [None] * op.output.ndim

    labels = [None if dim is None else info.labels[dim] for dim in origin]
    op.set_labels(op.output, labels, [i for i, dim in enumerate(origin) if dim in info.zero_dims])


def _index_select(op: OperatorCall) -> None:
    """Label the output of ``index_select(x, dim, index)`` with the labels of the index.

    An entry of the index and its position in the output are removed together. The gather of an expansion relies on
    this: its index is a buffer that shrinks with the layer.
    """
    x, index = op.operands[0], op.operands[1]
    info = op.info(x)
    selected = op.arg(1, "dim") % x.ndim
    op.freeze(info.labels[selected], "channels are picked by an index")
    index_labels = op.info(index).labels[0] if index.ndim else None
    labels = [index_labels if dim == selected else vector for dim, vector in enumerate(info.labels)]
    op.set_labels(op.output, labels, info.zero_dims - {selected})


def _index_copy(op: OperatorCall) -> None:
    """Label the output of ``index_copy(x, dim, index, source)``, which has a fixed width.

    An expansion scatters the outputs of its layer in this way.
    """
    target, scattered, index, source = op.args
    scattered %= target.ndim
    info = op.info(source)
    op.match(op.info(index).labels[0], info.labels[scattered], "channels are scattered")
    labels = [None if dim == scattered else vector for dim, vector in enumerate(info.labels)]
    op.set_labels(op.output, labels, [dim for dim in info.zero_dims if dim != scattered])


def _embedding(op: OperatorCall) -> None:
    """Label the output of ``embedding(weight, index)``.

    The rows of the weight are frozen. Its columns are the last dimension of the output.
    """
    weight, index = (op.info(x) for x in op.operands[:2])
    op.freeze(weight.labels[0], "the vocabulary of an embedding")
    op.set_labels(op.output, [*index.labels, *weight.labels[1:]], {op.output.ndim - 1})


def _grid_sample(op: OperatorCall) -> None:
    """Label the output of ``grid_sampler_2d(x, grid, ...)``.

    The spatial dimensions of x and all dimensions of the grid are frozen.
    """
    x, grid = (op.info(operand) for operand in op.operands[:2])
    for vector in (*x.labels[2:], *grid.labels):
        op.freeze(vector, "positions that are sampled")
    op.set_labels(op.output, [*x.labels[:2], *[None] * (op.output.ndim - 2)], x.zero_dims & {0, 1})


_NAMES: dict[Rule, str] = {
    _index: "index",
    _index_select: "index_select",
    _index_copy: "index_copy",
    _embedding: "embedding",
    _grid_sample: "grid_sampler_2d grid_sampler_3d",
}
INDEXING_RULES = rule_table(_NAMES)

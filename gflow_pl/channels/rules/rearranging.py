"""Rules of operators that exchange positions between channels and other dimensions, or between groups of channels."""

from __future__ import annotations

import numpy as np

from gflow_pl.channels.constraints import FIXED
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["REARRANGING_RULES"]

_SPATIAL = "a spatial dim"


def _pixel_shuffle(op: OperatorCall) -> None:
    """Label the output of ``pixel_shuffle(x, factor)`` and ``pixel_unshuffle(x, factor)``.

    A channel at the fine resolution is ``factor**2`` channels at the coarse one.
    """
    x, factor = op.operands[0], op.arg(1, "upscale_factor", op.kwargs.get("downscale_factor"))
    info = op.info(x)
    channels = info.labels[-3]
    for side in info.labels[-2:]:
        op.freeze(side, _SPATIAL)
    if channels is not None and op.name == "pixel_shuffle":
        rows = channels.reshape(-1, factor**2)
        op.join_rows(rows)
        channels = rows[:, 0]
    elif channels is not None:
        channels = np.repeat(channels, factor**2)
    op.set_labels(op.output, [*info.labels[:-3], channels, None, None], info.zero_dims)


def _channel_shuffle(op: OperatorCall) -> None:
    """Label the output of ``channel_shuffle(x, groups)``.

    It takes the channels of all groups in turns. All groups lose the same positions, or, if the module counts the
    groups, whole groups go.
    """
    info = op.info(op.operands[0])
    channels, groups = info.labels[1], op.args[1]
    groups_that_stay = np.full(groups, FIXED)
    if channels is not None:
        counts = op.size_attributes(groups)
        choice = op.choose(1 + len(counts), is_certain=True) if counts else 0
        rows = channels.reshape(groups, -1)
        op.join_rows(rows if choice else rows.T)
        if choice:
            op.note_count(counts[choice - 1], rows[:, 0])
            groups_that_stay = rows[:, 0]
        channels = rows.T.reshape(-1)
    op.expect_argument(1, groups_that_stay)
    op.set_labels(op.output, [info.labels[0], channels, *info.labels[2:]], info.zero_dims)


def _im2col(op: OperatorCall) -> None:
    """Label the output of ``im2col(x, ...)``, which is `torch.nn.functional.unfold`.

    The pixels of a patch become channels, first all of the first channel.
    """
    x = op.operands[0]
    info = op.info(x)
    for side in info.labels[-2:]:
        op.freeze(side, _SPATIAL)
    channels = info.labels[-3]
    patch_size = op.output.shape[-2] // x.shape[-3]
    columns = None if channels is None else np.repeat(channels, patch_size)
    op.set_labels(op.output, [*info.labels[:-3], columns, None], info.zero_dims)


def _col2im(op: OperatorCall) -> None:
    """Label the output of ``col2im(x, ...)``, the inverse of im2col, which is `torch.nn.functional.fold`."""
    info = op.info(op.operands[0])
    channels = info.labels[-2]
    op.freeze(info.labels[-1], _SPATIAL)
    if channels is not None:
        rows = channels.reshape(op.output.shape[-3], -1)
        op.join_rows(rows)
        channels = rows[:, 0]
    op.set_labels(op.output, [*info.labels[:-2], channels, None, None], info.zero_dims)


def _unfold(op: OperatorCall) -> None:
    """Label the output of ``unfold(x, dimension, size, step)``, which is `torch.Tensor.unfold`.

    Windows that slide along a dimension become a new last dimension.
    """
    x = op.operands[0]
    info = op.info(x)
    unfolded = op.arg(1, "dimension") % x.ndim
    op.freeze(info.labels[unfolded], "windows slide along the channels")
    labels = [None if dim == unfolded else vector for dim, vector in enumerate(info.labels)]
    op.set_labels(op.output, [*labels, None], info.zero_dims - {unfolded})


def _glu(op: OperatorCall) -> None:
    """Label the output of ``glu(x, dim=-1)``: one half of the channels times the gates of the other half."""
    x = op.operands[0]
    info = op.info(x)
    dim = op.arg(1, "dim", -1) % x.ndim
    labels = list(info.labels)
    vector = labels[dim]
    if vector is not None:
        rows = vector.reshape(2, -1).T
        op.join_rows(rows)
        labels[dim] = rows[:, 0]
    op.set_labels(op.output, labels, info.zero_dims)


def _triangle(op: OperatorCall) -> None:
    """Label the output of ``tril(x)`` and ``triu(x)``; rows and columns of the matrix are frozen."""
    info = op.info(op.operands[0])
    for vector in info.labels[-2:]:
        op.freeze(vector, "a triangle of a matrix")
    op.set_labels(op.output, info.labels, (), info.is_uniform)


_NAMES: dict[Rule, str] = {
    _pixel_shuffle: "pixel_shuffle pixel_unshuffle",
    _channel_shuffle: "channel_shuffle native_channel_shuffle",
    _im2col: "im2col",
    _col2im: "col2im",
    _unfold: "unfold",
    _glu: "glu",
    _triangle: "tril triu",
}
REARRANGING_RULES = rule_table(_NAMES)

"""Rules of normalization layers."""

from __future__ import annotations

from torch import Tensor

from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.reductions import NORM_OF_WEIGHT
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["NORM_RULES"]

_FIXED_CHANNELS = "a norm of channels that cannot change"
_GROUP_NORM = "a group norm over the pruned dim"


def _batch_norm(op: OperatorCall) -> None:
    """Label the outputs of ``native_batch_norm(x, weight, bias, running_mean, running_var, ...)`` and its variants.

    Every channel is normalized alone, so that the removal of channels is exact. Another pruned dimension is inexact,
    because the statistics of a channel run over it.
    """
    x = op.operands[0]
    info = op.info(x)
    for vector in op.operands[1:]:
        op.match(info.labels[1], op.info(vector).labels[0], _FIXED_CHANNELS)
    for dim, labels in enumerate(info.labels):
        if dim != 1:
            op.mark_inexact(labels, "a batch norm over the pruned dim")

    # The normalized tensor, and the statistics: vectors over the channels, or buffers without meaning.
    output, *statistics = op.outputs
    op.set_labels(output, info.labels, _zero_dims_of_norm(op))
    for extra in statistics:
        channels = info.labels[1] if extra.shape[:1] == x.shape[1:2] else None
        op.set_labels(extra, [channels] * extra.ndim, is_uniform=extra.ndim != 1)


def _zero_dims_of_norm(op: OperatorCall) -> set[int]:
    """Return the zero dimensions behind a norm over channels.

    With weight and bias, a channel is zero if its weight and bias are. Without, it is zero if it was zero before.
    """
    return {1} if isinstance(op.arg(1, "weight"), Tensor) else {1} & op.info(op.operands[0]).zero_dims


def _layer_norm(op: OperatorCall) -> None:
    """Label the outputs of ``native_layer_norm(x, normalized_shape, weight, bias, eps)``.

    Every channel depends on all others, so that the removal of channels is inexact.
    """
    x = op.operands[0]
    info = op.info(x)
    first = x.ndim - len(op.args[1])
    for affine in op.operands[1:]:
        for labels, own in zip(info.labels[first:], op.info(affine).labels, strict=True):
            op.match(labels, own, _FIXED_CHANNELS)
    for labels in info.labels[first:]:
        op.mark_inexact(labels, "a layer norm over the pruned dim")

    # The normalized tensor, and its mean and deviation.
    output, *moments = op.outputs
    op.set_labels(output, info.labels, range(first, x.ndim) if len(op.operands) > 1 else ())
    for moment in moments:
        op.set_labels(moment, [*info.labels[:first], *[None] * (moment.ndim - first)])


def _group_norm(op: OperatorCall) -> None:
    """Label the outputs of ``native_group_norm(x, weight, bias, N, C, HxW, group, eps)``.

    If there are at least as many groups as channels in one group, and the module counts its groups, whole groups are
    removed, which is exact. Otherwise all groups lose the same positions, which is inexact.
    """
    # Weight and bias have the channels of the input.
    x, groups = op.operands[0], op.arg(6, "group")
    info = op.info(x)
    channels = info.labels[1]
    for vector in op.operands[1:]:
        op.match(channels, op.info(vector).labels[0], _FIXED_CHANNELS)
    # What can be removed together.
    if channels is not None and groups < len(channels):
        channels_of = channels.reshape(groups, -1)
        counts_groups = any(attribute.name == "num_groups" for attribute in op.size_attributes(groups))
        if groups >= channels_of.shape[1] and counts_groups:
            op.join_rows(channels_of)
            op.note_own_count("num_groups", channels_of[:, 0])
        else:
            op.join_rows(channels_of.T)
            op.mark_inexact(channels, _GROUP_NORM)
    elif channels is not None:
        op.note_own_count("num_groups", channels)
    for dim in range(2, x.ndim):
        op.mark_inexact(info.labels[dim], _GROUP_NORM)

    # The output, and the mean and the reciprocal deviation of every group.
    output, *moments = op.outputs
    op.set_labels(output, info.labels, _zero_dims_of_norm(op))
    for moment in moments:
        op.set_labels(moment, [None] * moment.ndim, is_uniform=True)


def _weight_norm(op: OperatorCall) -> None:
    """Label the outputs of ``_weight_norm_interface(v, g, dim=0)``.

    The weight has the labels of its direction v, and its length g matches them. All other dimensions are inexact,
    because the norm runs over them.
    """
    direction, length = op.operands[:2]
    dim = op.arg(2, "dim", 0)
    info = op.info(direction)
    op.match(info.labels[dim], op.info(length).labels[dim], "a weight norm of channels that cannot change")
    for other, labels in enumerate(info.labels):
        if other != dim:
            op.mark_inexact(labels, NORM_OF_WEIGHT)
    op.set_labels(op.output[0], info.labels, info.zero_dims)
    op.set_labels(op.output[1], op.info(length).labels)


_NAMES: dict[Rule, str] = {
    _batch_norm: """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
        miopen_batch_norm _batch_norm_with_update _batch_norm_no_update _batch_norm_with_update_functional
        _native_batch_norm_legit_functional""",
    _layer_norm: "native_layer_norm _fused_rms_norm",
    _group_norm: "native_group_norm",
    _weight_norm: "_weight_norm_interface",
}
NORM_RULES = rule_table(_NAMES)

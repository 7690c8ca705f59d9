"""Rules of convolutions: plain, grouped and transposed ones."""

from __future__ import annotations

import numpy as np

from gflow_pl.channels.constraints import FIXED, Labels
from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["CONVOLUTION_RULES"]

_INPUT = "reads channels that cannot change"


def _convolution(op: OperatorCall) -> None:
    """Label the output of a convolution.

    ``convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``. The weight is
    (filters, channels of one group, *kernel), and (channels, filters of one group, *kernel) if the convolution is
    transposed.
    """
    x, weight, bias = op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias")
    is_transposed, groups = bool(op.arg(6, "transposed", False)), op.arg(8, "groups", 1)
    labels, kernel = op.info(x).labels, op.info(weight).labels

    # Channels that are read, and filters.
    if groups == 1:
        inputs, filters = (kernel[0], kernel[1]) if is_transposed else (kernel[1], kernel[0])
        op.match(labels[1], inputs, _INPUT)
    elif is_transposed and not weight.shape[0] == groups == op.output.shape[1]:
        for vector in (labels[1], kernel[0]):
            op.freeze(vector, "a grouped transposed convolution")
        filters = None if kernel[1] is None else np.tile(kernel[1], groups)  # all groups lose the same positions
    else:
        filters = _grouped_filters(op, labels[1], kernel, groups)
    if bias is not None:
        op.match(filters, op.info(bias).labels[0], "a bias whose filters cannot change")

    # Dimensions that the kernel slides along.
    sides = [_side_labels(op, labels[dim], x.shape[dim] == op.output.shape[dim]) for dim in range(2, x.ndim)]
    for vector in kernel[2:]:
        op.freeze(vector, "a spatial dim of a kernel")
    op.set_labels(op.output, [labels[0], filters, *sides], {1})


def _side_labels(op: OperatorCall, labels: Labels | None, has_same_size: bool) -> Labels | None:
    """Return the labels of an output dimension that the kernel slides along.

    Usually this is height or width and has no labels. In efficient channel attention it is the channels.
    """
    if labels is not None and has_same_size:
        op.mark_inexact(labels, "a convolution slides along the channels")
        return labels
    op.freeze(labels, "a convolution slides along the channels and changes their number")
    return None


def _grouped_filters(op: OperatorCall, inputs: Labels | None, kernel: DimLabels, groups: int) -> Labels | None:
    """Add the constraints of a grouped convolution, and return the labels of its output channels.

    With at least as many groups as channels in one group, whole groups are removed (a depthwise convolution is the
    usual case). Otherwise all groups lose the same positions.

    Args:
        op: The call.
        inputs: Labels of the input channels.
        kernel: Labels of the weight.
        groups: Number of groups.
    """
    filters = kernel[0]
    if inputs is None or filters is None:
        op.match(inputs, filters, "a grouped convolution that " + _INPUT)
        return filters

    inputs_of, filters_of = inputs.reshape(groups, -1), filters.reshape(groups, -1)
    if groups >= inputs_of.shape[1]:
        op.join_rows(inputs_of)
        op.join_rows(filters_of)
        op.join(inputs_of[:, 0], filters_of[:, 0])
        if inputs_of.shape[1] > 1:
            op.freeze(kernel[1], "whole groups of the convolution go together")
        op.note_own_count("groups", inputs_of[:, 0])
    else:
        op.join_rows(inputs_of.T)
        op.join_rows(filters_of.T)
        op.match(inputs_of[0], kernel[1], _INPUT)
        # State that `groups` stays: shapes alone suggest that whole groups are gone if a multiple of a group remains.
        op.note_own_count("groups", np.full(groups, FIXED, np.int64))
    op.note_own_count("in_channels", inputs)
    op.note_own_count("out_channels", filters)
    return filters


def _deformable(op: OperatorCall) -> None:
    """Label the output of torchvision's ``deform_conv2d``.

    The arguments are x, weight, offset, mask, bias, three pairs of sizes, groups, groups of offsets, and whether there
    is a mask. The offsets and the mask have a channel for every position of the kernel, which stay.
    """
    x, weight, offset, mask, bias = op.args[:5]
    labels, kernel = op.info(x).labels, op.info(weight).labels
    for vector in (*op.info(offset).labels, *op.info(mask).labels, *kernel[2:], *labels[2:]):
        op.freeze(vector, "positions that a deformable convolution samples")
    filters = kernel[0]
    if op.args[11] == op.args[12] == 1:
        op.match(labels[1], kernel[1], _INPUT)
    else:
        for vector in (labels[1], kernel[0], kernel[1]):
            op.freeze(vector, "a grouped deformable convolution")
        filters = None
    op.match(filters, op.info(bias).labels[0], "a bias whose filters cannot change")
    op.set_labels(op.output, [labels[0], filters, None, None], {1})


_NAMES: dict[Rule, str] = {
    _deformable: "torchvision::deform_conv2d",
    _convolution: "convolution convolution_overrideable _convolution cudnn_convolution mkldnn_convolution",
}
CONVOLUTION_RULES = rule_table(_NAMES)

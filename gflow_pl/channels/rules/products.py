"""Rules of convolutions, matrix products, attention, normalisation and embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.values import SizeAttribute

__all__ = ["PRODUCTS"]

_INPUT = "reads channels that cannot change"


def _convolution(op: OperatorCall) -> None:
    x, weight, bias = op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias")
    transposed, groups = bool(op.arg(6, "transposed", False)), op.arg(8, "groups", 1)
    source, kernel = op.info(x).labels, op.info(weight).labels
    if groups == 1:
        inner, outer = (kernel[0], kernel[1]) if transposed else (kernel[1], kernel[0])
        op.match(source[1], inner, _INPUT)
    elif transposed and not weight.shape[0] == groups == op.output.shape[1]:
        for label in (source[1], kernel[0]):
            op.freeze(label, "a grouped transposed convolution")
        # the same position of every group
        outer = None if kernel[1] is None else np.tile(kernel[1], groups)
    else:
        outer = _grouped(op, source[1], kernel, weight, groups)
    if bias is not None:
        op.match(outer, op.info(bias).labels[0], "a bias whose filters cannot change")
    moved = [_convolved(op, source[dim], x.shape[dim] == op.output.shape[dim]) for dim in range(2, x.ndim)]
    for label in kernel[2:]:
        op.freeze(label, "a spatial dim of a kernel")
    op.set_labels(op.output, [source[0], outer, *moved], {1})


def _convolved(op: OperatorCall, label: Labels | None, same_size: bool) -> Labels | None:
    """A dim that the kernel slides along (the channels, in efficient channel attention)."""
    if label is not None and same_size:
        op.mark_inexact(label, "a convolution slides along the channels")
        return label
    op.freeze(label, "a convolution slides along the channels and changes their number")
    return None


def _grouped(op: OperatorCall, source: Labels | None, kernel: DimLabels, weight: Tensor, groups: int) -> Labels | None:
    """Whole groups go where there are many small ones, else the same position of every group."""
    filters = kernel[0]
    if source is None or filters is None:
        op.match(source, filters, "a grouped convolution that " + _INPUT)
        return filters
    by_source, by_filter = source.reshape(groups, -1), filters.reshape(groups, -1)
    if groups >= by_source.shape[1]:
        op.join_rows(by_source)
        op.join_rows(by_filter)
        op.join(by_source[:, 0], by_filter[:, 0])
        if by_source.shape[1] > 1:
            op.freeze(kernel[1], "whole groups of the convolution go together")
        _module_counts(op, "groups", groups, by_source[:, 0])
    else:
        op.join_rows(by_source.T)
        op.join_rows(by_filter.T)
        op.match(by_source[0], kernel[1], _INPUT)
        # Shapes alone would say that whole groups went, where the size left is a multiple of theirs.
        _module_counts(op, "groups", groups, np.zeros(groups, np.int64))
    _module_counts(op, "in_channels", len(source), source)
    _module_counts(op, "out_channels", len(filters), filters)
    return filters


def _module_counts(op: OperatorCall, attribute: str, value: int, nodes: Labels) -> None:
    """The running module's attribute is the number of these nodes, if it has one of that value."""
    if op.module is not None and vars(op.module).get(attribute) == value:
        op.note_count(SizeAttribute(op.module_name, attribute), nodes)


def _batch_norm(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    for vector in op.operands[1:]:
        op.match(info.labels[1], op.info(vector).labels[0], "a norm of channels that cannot change")
    for dim, label in enumerate(info.labels):
        if dim != 1:
            op.mark_inexact(label, "a batch norm over the pruned dim")
    outs = (
        [out for out in op.output if isinstance(out, Tensor)] if isinstance(op.output, (tuple, list)) else [op.output]
    )
    op.set_labels(outs[0], info.labels, _normed_zero(op))
    for out in outs[1:]:
        op.set_labels(
            out, [info.labels[1] if out.shape[:1] == x.shape[1:2] else None] * out.ndim, is_uniform=out.ndim != 1
        )


def _normed_zero(op: OperatorCall) -> set[int]:
    """A norm's factor and shift leave nothing of a removed unit; without them, what came in as zeros goes out as such."""
    return {1} if isinstance(op.arg(1, "weight"), Tensor) else {1} & op.info(op.operands[0]).zero_dims


def _layer_norm(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    first = x.ndim - len(op.args[1])
    for vector in op.operands[1:]:
        for label, own in zip(info.labels[first:], op.info(vector).labels, strict=True):
            op.match(label, own, "a norm of channels that cannot change")
    for label in info.labels[first:]:
        op.mark_inexact(label, "a layer norm over the pruned dim")
    outs = op.output if isinstance(op.output, (tuple, list)) else [op.output]
    zero = set(range(first, x.ndim)) if len(op.operands) > 1 else set()
    op.set_labels(outs[0], info.labels, zero)
    for out in outs[1:]:
        if isinstance(out, Tensor):
            op.set_labels(out, [*info.labels[:first], *[None] * (out.ndim - first)])


def _group_norm(op: OperatorCall) -> None:
    x, groups = op.operands[0], op.arg(6, "group")
    info = op.info(x)
    for vector in op.operands[1:]:
        op.match(info.labels[1], op.info(vector).labels[0], "a norm of channels that cannot change")
    label = info.labels[1]
    if label is not None and groups < len(label):
        rows = label.reshape(groups, -1)
        if groups >= rows.shape[1] and any(attribute.name == "num_groups" for attribute in op.size_attributes(groups)):
            op.join_rows(rows)
            _module_counts(op, "num_groups", groups, rows[:, 0])
        else:
            op.join_rows(rows.T)
            op.mark_inexact(label, "a group norm over the pruned dim")
    elif label is not None:
        _module_counts(op, "num_groups", groups, label)
    for dim in range(2, x.ndim):
        op.mark_inexact(info.labels[dim], "a group norm over the pruned dim")
    op.set_labels(op.output[0], info.labels, _normed_zero(op))
    for out in op.output[1:]:
        op.set_labels(out, [None] * out.ndim, is_uniform=True)


def _contract(op: OperatorCall, a: Tensor, i: int, b: Tensor, j: int) -> None:
    """The dim that a product sums over: exact where one side has nothing but zeros there."""
    left, right = op.info(a), op.info(b)
    op.match(left.labels[i], right.labels[j], _INPUT)
    if i % a.ndim not in left.zero_dims and j % b.ndim not in right.zero_dims:
        op.mark_inexact(left.labels[i], "a product sums over channels that are not zero once removed")


def _mm(op: OperatorCall) -> None:
    a, b = op.args[-2:]
    _contract(op, a, 1, b, 0)
    op.set_labels(op.output, [op.info(a).labels[0], op.info(b).labels[1]], _outer_zeros(op, a, b))


def _addmm(op: OperatorCall) -> None:
    bias, a, b = op.args[:3]
    _contract(op, a, a.ndim - 1, b, b.ndim - 2)
    labels: DimLabels = [*op.info(a).labels[:-1], op.info(b).labels[-1]]
    for back in range(1, bias.ndim + 1):
        if bias.shape[-back] == op.output.shape[-back]:
            op.match(labels[-back], op.info(bias).labels[-back], "a bias whose filters cannot change")
    op.set_labels(
        op.output,
        labels,
        _outer_zeros(op, a, b) & {dim + op.output.ndim - bias.ndim for dim in op.info(bias).zero_dims},
    )


def _outer_zeros(op: OperatorCall, a: Tensor, b: Tensor) -> set[int]:
    zero = {dim for dim in op.info(a).zero_dims if dim < a.ndim - 1}
    return zero | ({a.ndim - 1} if b.ndim - 1 in op.info(b).zero_dims else set())


def _bmm(op: OperatorCall) -> None:
    a, b = op.args[-2:]
    _contract(op, a, 2, b, 1)
    if op.info(a).labels[0] is not None or op.info(b).labels[0] is not None:
        op.match(op.info(a).labels[0], op.info(b).labels[0], "a batched product with channels that cannot change")
    op.set_labels(op.output, [op.info(a).labels[0], op.info(a).labels[1], op.info(b).labels[2]], _outer_zeros(op, a, b))


def _mv(op: OperatorCall) -> None:
    a, b = op.args[-2:]
    _contract(op, a, a.ndim - 1, b, 0)
    op.set_labels(op.output, op.info(a).labels[:-1])


def _attention(op: OperatorCall) -> None:
    query, key, value = op.args[:3]
    q, k, v = op.info(query).labels, op.info(key).labels, op.info(value).labels
    for dim in range(query.ndim - 2):
        if query.shape[dim] == key.shape[dim] == value.shape[dim]:
            for other in (k[dim], v[dim]):
                if q[dim] is not None or other is not None:
                    op.match(q[dim], other, "heads that cannot change")
    _contract(op, query, query.ndim - 1, key, key.ndim - 1)
    if op.kwargs.get("scale") is None:
        op.mark_inexact(q[-1], "the scale of an attention follows its width")
    for label in (k[-2], v[-2]):
        op.freeze(label, "the positions that an attention looks at")
    outs = op.output if isinstance(op.output, (tuple, list)) else [op.output]
    heads = set(range(query.ndim - 2)) & op.info(value).zero_dims
    last = {query.ndim - 1} & op.info(value).zero_dims
    op.set_labels(outs[0], [*q[:-1], v[-1]], heads | last)
    for out in outs[1:]:
        if isinstance(out, Tensor):
            op.set_labels(out, [None] * out.ndim, is_uniform=True)


def _embedding(op: OperatorCall) -> None:
    weight, index = op.operands[0], op.operands[1]
    op.freeze(op.info(weight).labels[0], "the vocabulary of an embedding")
    op.set_labels(op.output, [*op.info(index).labels, *op.info(weight).labels[1:]], {op.output.ndim - 1})


def _weight_norm(op: OperatorCall) -> None:
    direction, length = op.operands[:2]
    dim = op.arg(2, "dim", 0)
    op.match(
        op.info(direction).labels[dim],
        op.info(length).labels[dim],
        "a weight norm of channels that cannot change",
    )
    op.set_labels(op.output[0], op.info(direction).labels, op.info(direction).zero_dims)
    op.set_labels(op.output[1], op.info(length).labels)


def _named(rule: Rule, names: str) -> dict[str, Any]:
    return {name: rule for name in names.split()}


PRODUCTS: dict[str, Rule] = {
    **_named(_convolution, "convolution convolution_overrideable _convolution cudnn_convolution mkldnn_convolution"),
    **_named(
        _batch_norm,
        """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
        miopen_batch_norm _batch_norm_with_update _batch_norm_no_update _batch_norm_with_update_functional
        _native_batch_norm_legit_functional""",
    ),
    **_named(_layer_norm, "native_layer_norm _fused_rms_norm"),
    **_named(_group_norm, "native_group_norm"),
    **_named(_mm, "mm"),
    **_named(_addmm, "addmm baddbmm"),
    **_named(_bmm, "bmm"),
    **_named(_mv, "mv dot"),
    **_named(
        _attention,
        """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable""",
    ),
    **_named(_embedding, "embedding"),
    **_named(_weight_norm, "_weight_norm_interface"),
}

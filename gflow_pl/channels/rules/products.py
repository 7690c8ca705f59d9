"""Rules of convolutions, matrix products, attention, normalisation and embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.recorder import DimLabels, Op, Recorder, Rule
from gflow_pl.values import SizeAttribute

__all__ = ["PRODUCTS"]

_INPUT = "reads channels that cannot change"


def _convolution(t: Recorder, op: Op) -> None:
    x, weight, bias = op.arg(0, "input"), op.arg(1, "weight"), op.arg(2, "bias")
    transposed, groups = bool(op.arg(6, "transposed", False)), op.arg(8, "groups", 1)
    source, kernel = t.labels(x), t.labels(weight)
    if groups == 1:
        inner, outer = (kernel[0], kernel[1]) if transposed else (kernel[1], kernel[0])
        t.meet(source[1], inner, _INPUT)
    elif transposed and not weight.shape[0] == groups == op.out.shape[1]:
        for label in (source[1], kernel[0]):
            t.constraints.freeze(label, "a grouped transposed convolution")
        # the same position of every group
        outer = None if kernel[1] is None else np.tile(kernel[1], groups)
    else:
        outer = _grouped(t, source[1], kernel, weight, groups)
    if bias is not None:
        t.meet(outer, t.labels(bias)[0], "a bias whose filters cannot change")
    moved = [_convolved(t, source[dim], x.shape[dim] == op.out.shape[dim]) for dim in range(2, x.ndim)]
    for label in kernel[2:]:
        t.constraints.freeze(label, "a spatial dim of a kernel")
    t.put(op.out, [source[0], outer, *moved], {1})


def _convolved(t: Recorder, label: Labels | None, same_size: bool) -> Labels | None:
    """A dim that the kernel slides along (the channels, in efficient channel attention)."""
    if label is not None and same_size:
        t.constraints.mark_inexact(label, "a convolution slides along the channels")
        return label
    t.constraints.freeze(label, "a convolution slides along the channels and changes their number")
    return None


def _grouped(t: Recorder, source: Labels | None, kernel: DimLabels, weight: Tensor, groups: int) -> Labels | None:
    """Whole groups go where there are many small ones, else the same position of every group."""
    filters = kernel[0]
    if source is None or filters is None:
        t.meet(source, filters, "a grouped convolution that " + _INPUT)
        return filters
    by_source, by_filter = source.reshape(groups, -1), filters.reshape(groups, -1)
    if groups >= by_source.shape[1]:
        t.constraints.join_rows(by_source)
        t.constraints.join_rows(by_filter)
        t.constraints.join(by_source[:, 0], by_filter[:, 0])
        if by_source.shape[1] > 1:
            t.constraints.freeze(kernel[1], "whole groups of the convolution go together")
        _module_counts(t, "groups", groups, by_source[:, 0])
    else:
        t.constraints.join_rows(by_source.T)
        t.constraints.join_rows(by_filter.T)
        t.meet(by_source[0], kernel[1], _INPUT)
        # Shapes alone would say that whole groups went, where the size left is a multiple of theirs.
        _module_counts(t, "groups", groups, np.zeros(groups, np.int64))
    _module_counts(t, "in_channels", len(source), source)
    _module_counts(t, "out_channels", len(filters), filters)
    return filters


def _module_counts(t: Recorder, attribute: str, value: int, nodes: Labels) -> None:
    """The running module's attribute is the number of these nodes, if it has one of that value."""
    if t.stack and vars(t.stack[-1][1]).get(attribute) == value:
        t.follows(SizeAttribute(t.stack[-1][0], attribute), nodes)


def _batch_norm(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    for vector in op.tensors[1:]:
        t.meet(tag.labels[1], t.labels(vector)[0], "a norm of channels that cannot change")
    for dim, label in enumerate(tag.labels):
        if dim != 1:
            t.constraints.mark_inexact(label, "a batch norm over the pruned dim")
    outs = [out for out in op.out if isinstance(out, Tensor)] if isinstance(op.out, (tuple, list)) else [op.out]
    t.put(outs[0], tag.labels, _normed_zero(t, op))
    for out in outs[1:]:
        t.put(out, [tag.labels[1] if out.shape[:1] == x.shape[1:2] else None] * out.ndim, uniform=out.ndim != 1)


def _normed_zero(t: Recorder, op: Op) -> set[int]:
    """A norm's factor and shift leave nothing of a removed unit; without them, what came in as zeros goes out as such."""
    return {1} if isinstance(op.arg(1, "weight"), Tensor) else {1} & t.tag(op.tensors[0]).zero


def _layer_norm(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    first = x.ndim - len(op.args[1])
    for vector in op.tensors[1:]:
        for label, own in zip(tag.labels[first:], t.labels(vector), strict=True):
            t.meet(label, own, "a norm of channels that cannot change")
    for label in tag.labels[first:]:
        t.constraints.mark_inexact(label, "a layer norm over the pruned dim")
    outs = op.out if isinstance(op.out, (tuple, list)) else [op.out]
    zero = set(range(first, x.ndim)) if len(op.tensors) > 1 else set()
    t.put(outs[0], tag.labels, zero)
    for out in outs[1:]:
        if isinstance(out, Tensor):
            t.put(out, [*tag.labels[:first], *[None] * (out.ndim - first)])


def _group_norm(t: Recorder, op: Op) -> None:
    x, groups = op.tensors[0], op.arg(6, "group")
    tag = t.tag(x)
    for vector in op.tensors[1:]:
        t.meet(tag.labels[1], t.labels(vector)[0], "a norm of channels that cannot change")
    label = tag.labels[1]
    if label is not None and groups < len(label):
        rows = label.reshape(groups, -1)
        if groups >= rows.shape[1] and any(attribute.name == "num_groups" for attribute in t.attributes_like(groups)):
            t.constraints.join_rows(rows)
            _module_counts(t, "num_groups", groups, rows[:, 0])
        else:
            t.constraints.join_rows(rows.T)
            t.constraints.mark_inexact(label, "a group norm over the pruned dim")
    elif label is not None:
        _module_counts(t, "num_groups", groups, label)
    for dim in range(2, x.ndim):
        t.constraints.mark_inexact(tag.labels[dim], "a group norm over the pruned dim")
    t.put(op.out[0], tag.labels, _normed_zero(t, op))
    for out in op.out[1:]:
        t.put(out, [None] * out.ndim, uniform=True)


def _contract(t: Recorder, a: Tensor, i: int, b: Tensor, j: int) -> None:
    """The dim that a product sums over: exact where one side has nothing but zeros there."""
    left, right = t.tag(a), t.tag(b)
    t.meet(left.labels[i], right.labels[j], _INPUT)
    if i % a.ndim not in left.zero and j % b.ndim not in right.zero:
        t.constraints.mark_inexact(left.labels[i], "a product sums over channels that are not zero once removed")


def _mm(t: Recorder, op: Op) -> None:
    a, b = op.args[-2:]
    _contract(t, a, 1, b, 0)
    t.put(op.out, [t.labels(a)[0], t.labels(b)[1]], _outer_zeros(t, a, b))


def _addmm(t: Recorder, op: Op) -> None:
    bias, a, b = op.args[:3]
    _contract(t, a, a.ndim - 1, b, b.ndim - 2)
    labels: DimLabels = [*t.labels(a)[:-1], t.labels(b)[-1]]
    for back in range(1, bias.ndim + 1):
        if bias.shape[-back] == op.out.shape[-back]:
            t.meet(labels[-back], t.labels(bias)[-back], "a bias whose filters cannot change")
    t.put(op.out, labels, _outer_zeros(t, a, b) & {dim + op.out.ndim - bias.ndim for dim in t.tag(bias).zero})


def _outer_zeros(t: Recorder, a: Tensor, b: Tensor) -> set[int]:
    zero = {dim for dim in t.tag(a).zero if dim < a.ndim - 1}
    return zero | ({a.ndim - 1} if b.ndim - 1 in t.tag(b).zero else set())


def _bmm(t: Recorder, op: Op) -> None:
    a, b = op.args[-2:]
    _contract(t, a, 2, b, 1)
    if t.labels(a)[0] is not None or t.labels(b)[0] is not None:
        t.meet(t.labels(a)[0], t.labels(b)[0], "a batched product with channels that cannot change")
    t.put(op.out, [t.labels(a)[0], t.labels(a)[1], t.labels(b)[2]], _outer_zeros(t, a, b))


def _mv(t: Recorder, op: Op) -> None:
    a, b = op.args[-2:]
    _contract(t, a, a.ndim - 1, b, 0)
    t.put(op.out, t.labels(a)[:-1])


def _attention(t: Recorder, op: Op) -> None:
    query, key, value = op.args[:3]
    q, k, v = t.labels(query), t.labels(key), t.labels(value)
    for dim in range(query.ndim - 2):
        if query.shape[dim] == key.shape[dim] == value.shape[dim]:
            for other in (k[dim], v[dim]):
                if q[dim] is not None or other is not None:
                    t.meet(q[dim], other, "heads that cannot change")
    _contract(t, query, query.ndim - 1, key, key.ndim - 1)
    if op.kwargs.get("scale") is None:
        t.constraints.mark_inexact(q[-1], "the scale of an attention follows its width")
    for label in (k[-2], v[-2]):
        t.constraints.freeze(label, "the positions that an attention looks at")
    outs = op.out if isinstance(op.out, (tuple, list)) else [op.out]
    heads = set(range(query.ndim - 2)) & t.tag(value).zero
    last = {query.ndim - 1} & t.tag(value).zero
    t.put(outs[0], [*q[:-1], v[-1]], heads | last)
    for out in outs[1:]:
        if isinstance(out, Tensor):
            t.put(out, [None] * out.ndim, uniform=True)


def _embedding(t: Recorder, op: Op) -> None:
    weight, index = op.tensors[0], op.tensors[1]
    t.constraints.freeze(t.labels(weight)[0], "the vocabulary of an embedding")
    t.put(op.out, [*t.labels(index), *t.labels(weight)[1:]], {op.out.ndim - 1})


def _weight_norm(t: Recorder, op: Op) -> None:
    direction, length = op.tensors[:2]
    dim = op.arg(2, "dim", 0)
    t.meet(t.labels(direction)[dim], t.labels(length)[dim], "a weight norm of channels that cannot change")
    t.put(op.out[0], t.labels(direction), t.tag(direction).zero)
    t.put(op.out[1], t.labels(length))


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

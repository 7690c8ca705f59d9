"""Rules of matrix products and of attention."""

from __future__ import annotations

from torch import Tensor

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["PRODUCT_RULES"]

_INPUT = "reads channels that cannot change"
_HEADS = "heads that cannot change"


def _contract(op: OperatorCall, a: Tensor, dim_a: int, b: Tensor, dim_b: int) -> None:
    """Match two dimensions that a product sums over.

    The removal of their channels is exact if one of the tensors is zero for removed channels.
    """
    info_a, info_b = op.info(a), op.info(b)
    # A uniform tensor (the first hidden state of a recurrent layer) takes any size.
    if not info_a.is_uniform and not info_b.is_uniform:
        op.match(info_a.labels[dim_a], info_b.labels[dim_b], _INPUT)
    if dim_a not in info_a.zero_dims and dim_b not in info_b.zero_dims:
        op.mark_inexact(info_a.labels[dim_a], "a product sums over channels that are not zero once removed")


def _zero_dims_of_product(op: OperatorCall, a: Tensor, b: Tensor) -> set[int]:
    """Return the zero dimensions of ``a @ b``: those of the rows of `a` and of the columns of `b`."""
    zero_dims = {dim for dim in op.info(a).zero_dims if dim < a.ndim - 1}
    return zero_dims | ({a.ndim - 1} if b.ndim - 1 in op.info(b).zero_dims else set())


def _mm(op: OperatorCall) -> None:
    """Label the output of ``mm(a, b)``."""
    a, b = op.args[-2:]
    _contract(op, a, 1, b, 0)
    op.set_labels(op.output, [op.info(a).labels[0], op.info(b).labels[1]], _zero_dims_of_product(op, a, b))


def _addmm(op: OperatorCall) -> None:
    """Label the output of ``addmm(bias, a, b)`` and ``baddbmm(bias, a, b)``: ``a @ b`` plus the broadcast bias."""
    bias, a, b = op.args[:3]
    _contract(op, a, a.ndim - 1, b, b.ndim - 2)
    labels: DimLabels = [*op.info(a).labels[:-1], op.info(b).labels[-1]]
    for back in range(1, bias.ndim + 1):
        if bias.shape[-back] == op.output.shape[-back]:
            op.match(labels[-back], op.info(bias).labels[-back], "a bias whose filters cannot change")
    zero_dims_of_bias = {dim + op.output.ndim - bias.ndim for dim in op.info(bias).zero_dims}
    op.set_labels(op.output, labels, _zero_dims_of_product(op, a, b) & zero_dims_of_bias)


def _bmm(op: OperatorCall) -> None:
    """Label the output of ``bmm(a, b)``: one product for every position of the first dimension."""
    a, b = op.args[-2:]
    labels_a, labels_b = op.info(a).labels, op.info(b).labels
    _contract(op, a, 2, b, 1)
    op.match(labels_a[0], labels_b[0], "a batched product with channels that cannot change")
    op.set_labels(op.output, [labels_a[0], labels_a[1], labels_b[2]], _zero_dims_of_product(op, a, b))


def _mv(op: OperatorCall) -> None:
    """Label the output of ``mv(a, b)``, ``dot(a, b)`` and ``vdot(a, b)``."""
    a, b = op.args[-2:]
    _contract(op, a, a.ndim - 1, b, 0)
    op.set_labels(op.output, op.info(a).labels[:-1])


def _attention(op: OperatorCall) -> None:
    """Label the outputs of a scaled dot product attention.

    ``f(query, key, value, ..., scale=None)`` with tensors of shape (..., heads, positions, width). Heads may be removed
    together from all three. So may positions of the width of query and key, which is inexact if the scale follows the
    width, and positions of the width of the value, which is the width of the output. In grouped-query attention,
    several consecutive heads of the query share one head of key and value, and go with it.
    """
    query, key, value = op.args[:3]
    labels_q, labels_k, labels_v = (op.info(x).labels for x in (query, key, value))
    for dim in range(query.ndim - 2):
        _match_heads(op, labels_k[dim], labels_v[dim], key.shape[dim])
        _match_heads(op, labels_k[dim], labels_q[dim], key.shape[dim])
    _contract(op, query, query.ndim - 1, key, key.ndim - 1)
    if op.kwargs.get("scale") is None:
        op.mark_inexact(labels_q[-1], "the scale of an attention follows its width")
    for positions in (labels_k[-2], labels_v[-2]):
        op.freeze(positions, "the positions that an attention looks at")

    # A head, or a position of the width, outputs zero where the value is zero.
    output, *extras = op.outputs
    dims = {*range(query.ndim - 2), query.ndim - 1}
    op.set_labels(output, [*labels_q[:-1], labels_v[-1]], dims & op.info(value).zero_dims)
    for extra in extras:
        op.set_labels(extra, [None] * extra.ndim, is_uniform=True)


def _trilinear(op: OperatorCall) -> None:
    """Label the output of ``_trilinear(a, b, c, expand_a, expand_b, expand_c, summed)``, which bilinear layers call.

    The three operands get dimensions of size 1, are multiplied, and the summed dimensions go.
    """
    ndim = op.args[0].ndim + len(op.args[3])
    summed = {dim % ndim for dim in op.args[6]}
    columns: list[list[tuple[Labels | None, bool]]] = [[] for _ in range(ndim)]
    for operand, expanded in zip(op.args[:3], op.args[3:6], strict=True):
        info = op.info(operand)
        own = [dim for dim in range(ndim) if dim not in {e % ndim for e in expanded}]
        for position, dim in enumerate(own):
            columns[dim].append((info.labels[position], position in info.zero_dims))
    labels: DimLabels = []
    zero_dims = set()
    for dim, column in enumerate(columns):
        vectors, is_zero = [vector for vector, _ in column], any(zero for _, zero in column)
        for vector in vectors[1:]:
            op.match(vectors[0], vector, _INPUT)
        if dim in summed:
            if not is_zero:
                op.mark_inexact(vectors[0], "a product sums over channels that are not zero once removed")
            continue
        zero_dims |= {len(labels)} if is_zero else set()
        labels.append(vectors[0])
    op.set_labels(op.output, labels, zero_dims)


def _grouped_mm(op: OperatorCall) -> None:
    """Label the output of ``_grouped_mm(a, b, offsets)``.

    Rows of a (rows, inputs) are multiplied with the matrix of b of their group. Other forms freeze the channels.
    """
    a, b = op.args[:2]
    labels_a, labels_b = op.info(a).labels, op.info(b).labels
    if a.ndim != 2 or b.ndim != 3:
        for vector in (*labels_a, *labels_b):
            op.freeze(vector, "a product of groups of matrices")
        op.set_labels(op.output, [None] * op.output.ndim)
        return
    _contract(op, a, 1, b, 1)
    for vector in (labels_a[0], labels_b[0]):
        op.freeze(vector, "the groups of a product of matrices")
    op.set_labels(op.output, [None, labels_b[2]], {1} if 2 in op.info(b).zero_dims else ())


def _match_heads(op: OperatorCall, shared: Labels | None, heads: Labels | None, num_shared: int) -> None:
    """Match every head of key and value with the consecutive heads that share it.

    Args:
        op: The call.
        shared: Labels of the heads of key and value; None if these cannot change.
        heads: Labels of the heads of the query, a multiple of these; None if these cannot change.
        num_shared: Number of heads of key and value. All heads of the query may share a single one, which stays.
    """
    if num_shared == 1 or heads is None or len(heads) == num_shared:
        if num_shared > 1:
            op.match(shared, heads, _HEADS)
        return
    for column in heads.reshape(num_shared, -1).T:
        op.match(shared, column, _HEADS)


_NAMES: dict[Rule, str] = {
    _mm: "mm",
    _addmm: "addmm baddbmm",
    _bmm: "bmm",
    _mv: "mv dot vdot",
    _trilinear: "_trilinear",
    _grouped_mm: "_grouped_mm",
    _attention: """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable""",
}
PRODUCT_RULES = rule_table(_NAMES)

"""The rule of operators that compute every position from the same position of their operands."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["ELEMENTWISE_RULES", "elementwise", "note_partial_write"]

_OF_ZERO_ZERO = frozenset(
    """abs alias alpha_dropout clone celu ceil contiguous detach dropout elu erf expm1 fix floor gelu hardswish
    leaky_relu lift_fresh log1p mish native_dropout neg _prelu_kernel prelu relu relu6 round rrelu_with_noise selu sgn
    sign silu sin sinh softshrink sqrt square tan tanh threshold _to_copy to asin asinh atan atanh
    hardshrink""".split()  # noqa: SIM905
)
"""Functions f with f(0) = 0, for all values of the other arguments."""

_ZERO_WITH_FIRST = frozenset(["div", "floor_divide", "pow", "true_divide", "hardtanh", "fmod", "remainder"])
"""Functions that are zero where the first operand is zero."""

_WRITES = frozenset(["copy_", "add_", "mul_", "sub_", "div_"])
"""In-place operators by which a network writes one tensor into a part of another."""


def elementwise(op: OperatorCall) -> None:
    """Label the output of any operator that works position by position.

    Shapes are aligned at their last dimensions and broadcast. In each dimension, the operands that have the size of the
    output must have the same channels there.
    """
    if not op.outputs:
        return
    if op.name.endswith("_"):
        note_partial_write(op)
    if op.name in _WRITES and _is_partial_copy(op):
        return
    infos = [op.info(x) for x in op.operands]
    for output in op.outputs:
        if infos and all([info.is_uniform for info in infos]):
            op.set_labels(output, [None] * output.ndim, is_uniform=True)
        elif len(infos) == 1 and output.shape == op.operands[0].shape:
            op.set_labels(output, infos[0].labels, _zero_dims(op, output))
        else:
            op.set_labels(output, _broadcast_labels(op, output), _zero_dims(op, output))


def _broadcast_labels(op: OperatorCall, output: Tensor) -> DimLabels:
    """Return the labels of an output, and match the labels of the operands in every dimension."""
    merged: DimLabels = [None] * output.ndim
    for dim, size in enumerate(output.shape):
        # The operands that have this dimension, counted from the end. Uniform ones fit any channels.
        back = dim - output.ndim
        present = [x for x in op.operands if x.ndim >= -back and not op.info(x).is_uniform]
        full = [(x, op.info(x).labels[back]) for x in present if x.shape[back] == size]
        labelled = [(x, vector) for x, vector in full if vector is not None]
        for x in present:
            if x.shape[back] != size:
                op.freeze(op.info(x).labels[back], "a single channel that is broadcast to many")

        # Channels stay if they meet a tensor without labels.
        if not labelled:
            continue
        merged[dim] = labelled[0][1]
        if len(labelled) < len(full):
            for _, vector in labelled:
                op.freeze(vector, "meets a tensor whose channels are not known")
            continue

        # The sum of two activations, a residual stream, gets labels of its own; other operands are joined.
        is_sum = op.name.removesuffix("_") in ("add", "sub") and size > 1
        for (a, first), (b, other) in pairwise(labelled):
            if is_sum and op.info(a).is_activation and op.info(b).is_activation and first is not other:
                merged[dim] = own = op.sum_labels(size)
                op.add_activations(first, other)
                op.join(own, first)
            else:
                op.join(first, other)
    return merged


def _zero_dims(op: OperatorCall, output: Tensor) -> set[int]:
    """Return the dimensions of the output along which a removed channel is zero."""
    # Zero dimensions of every operand, as dimensions of the output. One channel that is broadcast is not zero in all.
    name = op.name.removesuffix("_")
    zero_dims = []
    for x in op.operands:
        shift = output.ndim - x.ndim
        dims = op.info(x).zero_dims
        zero_dims.append({dim + shift for dim in dims if x.shape[dim] == output.shape[dim + shift]})
    if not zero_dims:
        return set()

    # Functions of one operand, some of which map zero to zero for certain arguments only.
    if name in _OF_ZERO_ZERO or name in _ZERO_WITH_FIRST:
        if name == "hardtanh" and not op.arg(1, "min_val", -1.0) <= 0 <= op.arg(2, "max_val", 1.0):
            return set()
        if name == "threshold" and op.arg(1, "threshold") >= 0 and op.arg(2, "value") != 0:
            return set()
        if name == "pow" and (isinstance(op.args[1], Tensor) or op.args[1] <= 0 or not isinstance(op.args[0], Tensor)):
            return set()
        return zero_dims[0]

    # A product is zero where any factor is, a sum where both terms are.
    if name == "mul":
        return set.union(*zero_dims)
    if name in ("add", "sub") and len(zero_dims) == 2:
        return set.intersection(*zero_dims)
    return set()


def note_partial_write(op: OperatorCall) -> None:
    """Note that a tensor is not uniform any more after an in-place operator on a part of it."""
    target = op.operands[0]
    if target._base is not None and target.numel() < target._base.numel():
        op.info(target).is_uniform = op.info(target._base).is_uniform = False


def _is_partial_copy(op: OperatorCall) -> bool:
    """Label the target of an in-place operator that fills a tensor with another one, in whole or in part.

    A part of a tensor without labels cannot take the labels of what is written into it, because the whole has none:
    these channels are frozen. A uniform tensor that is overwritten as a whole takes all labels.

    Returns:
        Whether this was such an operator, so that nothing is left to do.
    """
    target = op.operands[0]
    info = op.info(target)
    written = [x for x in op.operands[1:] if any(vector is not None for vector in op.info(x).labels)]
    if target._base is None or not written:
        if target._base is None and op.name == "copy_" and info.is_uniform and len(op.operands) > 1:
            source = op.info(op.operands[1])
            if target.shape == op.operands[1].shape:
                op.set_labels(target, source.labels, source.zero_dims, source.is_uniform)
                return True
        return False
    if info.is_uniform or all(vector is None for vector in info.labels) or op.info(target._base).is_uniform:
        for x in written:
            for vector in op.info(x).labels:
                op.freeze(vector, "written into a slice of a tensor that was made elsewhere")
        op.info(target._base).is_uniform = False
        info.is_uniform = False
        return True
    return False


_NAMES: dict[Rule, str] = {
    elementwise: """copy copy_ gelu dropout native_dropout hardswish hardsigmoid elu celu selu leaky_relu hardtanh relu
        relu6 silu mish threshold softplus log_sigmoid log_sigmoid_forward prelu _prelu_kernel rrelu_with_noise clamp
        where masked_fill rsub softshrink hardshrink add sub mul div addcmul addcdiv lerp pow""",
}
ELEMENTWISE_RULES = rule_table(_NAMES)

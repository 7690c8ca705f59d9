"""Rules of ops that work position by position, make new tensors, or only copy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule

__all__ = ["ELEMENTWISE", "pointwise", "unknown"]

# f(0) = 0 whatever the other arguments are
_ZERO_AT_ZERO = """abs alias alpha_dropout clone celu ceil contiguous detach dropout elu erf expm1 fix floor gelu hardswish leaky_relu
    lift_fresh log1p mish native_dropout neg _prelu_kernel prelu relu relu6 round rrelu_with_noise selu sgn sign silu sin
    sinh softshrink sqrt square tan tanh threshold _to_copy to asin asinh atan atanh hardshrink"""
_KEEPS_ZERO = frozenset(_ZERO_AT_ZERO.split())
# zero where the first operand is zero
_ZERO_WITH_FIRST = frozenset(["div", "floor_divide", "pow", "true_divide", "hardtanh", "fmod", "remainder"])
_UNCHANGED = "meets a tensor whose channels are not known"


def pointwise(op: OperatorCall) -> None:
    """Right-aligned, dim by dim: all operands of the full width are position by position the same."""
    outs = [
        out for out in (op.output if isinstance(op.output, (tuple, list)) else [op.output]) if isinstance(out, Tensor)
    ]
    if not outs:
        return
    if op.name.endswith("_"):
        _note_partial_write(op)
    if op.name in _WRITES and _writes_into_unknown(op):
        return
    infos = [op.info(tensor) for tensor in op.operands]
    for out in outs:
        if infos and all([info.is_uniform for info in infos]):
            op.set_labels(out, [None] * out.ndim, is_uniform=True)
        elif len(infos) == 1 and out.shape == op.operands[0].shape:
            op.set_labels(out, infos[0].labels, _zero_dims(op, out))
        else:
            op.set_labels(out, _aligned(op, out), _zero_dims(op, out))


def _aligned(op: OperatorCall, out: Tensor) -> DimLabels:
    merged: DimLabels = [None] * out.ndim
    for dim, size in enumerate(out.shape):
        back = dim - out.ndim
        present = [x for x in op.operands if x.ndim >= -back and not op.info(x).is_uniform]
        full = [(x, op.info(x).labels[back]) for x in present if x.shape[back] == size]
        labelled = [(x, label) for x, label in full if label is not None]
        for x in present:
            if x.shape[back] != size:
                op.freeze(op.info(x).labels[back], "a single channel that is broadcast to many")
        if not labelled:
            continue
        merged[dim] = labelled[0][1]
        if len(labelled) < len(full):
            for _, label in labelled:
                op.freeze(label, _UNCHANGED)
            continue
        adding = op.name.removesuffix("_") in ("add", "sub") and size > 1
        for (a, first), (b, other) in pairwise(labelled):
            if adding and op.info(a).is_activation and op.info(b).is_activation and first is not other:
                # What comes out belongs to neither operand alone: nodes of its own.
                merged[dim] = own = op.sum_labels(size)
                op.add_activations(first, other)
                op.join(own, first)
            else:
                op.join(first, other)
    return merged


def _zero_dims(op: OperatorCall, out: Tensor) -> set[int]:
    """Dims of the output along which a removed unit leaves zeros."""
    name = op.name.removesuffix("_")
    tensors = [(x, op.info(x)) for x in op.operands]
    # A single channel that meets many is no zero at their places.
    shifts = [out.ndim - x.ndim for x, _ in tensors]
    aligned = [
        {dim + shift for dim in info.zero_dims if x.shape[dim] == out.shape[dim + shift]}
        for (x, info), shift in zip(tensors, shifts, strict=True)
    ]
    if not aligned:
        return set()
    if name == "mul":
        return set.union(*aligned)
    if name in _KEEPS_ZERO or name in _ZERO_WITH_FIRST:
        if name == "hardtanh" and not op.arg(1, "min_val", -1.0) <= 0 <= op.arg(2, "max_val", 1.0):
            return set()
        if name == "threshold" and op.arg(1, "threshold") >= 0 and op.arg(2, "value") != 0:
            return set()
        if name == "pow" and (isinstance(op.args[1], Tensor) or op.args[1] <= 0 or not isinstance(op.args[0], Tensor)):
            return set()
        return aligned[0]
    if name in ("add", "sub") and len(tensors) == 2:
        return set.intersection(*aligned)
    return set()


def _note_partial_write(op: OperatorCall) -> None:
    """Of a tensor that one number fills, a part now holds others."""
    target = op.operands[0]
    if target._base is not None and target.numel() < target._base.numel():
        op.info(target).is_uniform = op.info(target._base).is_uniform = False


def _writes_into_unknown(op: OperatorCall) -> bool:
    """In-place writes: a view of a tensor that has no labels of its own would lose those of what is written."""
    target = op.operands[0]
    info = op.info(target)
    written = [x for x in op.operands[1:] if any(label is not None for label in op.info(x).labels)]
    if target._base is None or not written:
        if target._base is None and op.name == "copy_" and info.is_uniform and len(op.operands) > 1:
            source = op.info(op.operands[1])
            if target.shape == op.operands[1].shape:
                op.set_labels(target, source.labels, source.zero_dims, source.is_uniform)
                return True
        return False
    if info.is_uniform or all(label is None for label in info.labels) or op.info(target._base).is_uniform:
        for x in written:
            for label in op.info(x).labels:
                op.freeze(label, "written into a slice of a tensor that was made elsewhere")
        base = op.info(target._base)
        base.is_uniform = False
        info.is_uniform = False
        return True
    return False


def _like(op: OperatorCall) -> None:
    """A new tensor of a known tensor's shape."""
    info = op.info(op.operands[0])
    zero = range(op.output.ndim) if op.name == "zeros_like" else ()
    op.set_labels(op.output, info.labels, zero, info.is_uniform)


def _filled(op: OperatorCall) -> None:
    """One number everywhere: its size follows whatever it meets, and the probe sees whether that is right."""
    op.set_labels(op.output, [None] * op.output.ndim, is_uniform=True)


def _new(op: OperatorCall) -> None:
    """A new tensor of a shape that was given in numbers."""
    for out in op.output if isinstance(op.output, (tuple, list)) else [op.output]:
        op.set_labels(out, [None] * out.ndim)


def _same(op: OperatorCall) -> None:
    """Nothing but a copy or another view of the same positions."""
    info = op.info(op.operands[0])
    op.set_labels(op.output, info.labels, info.zero_dims, info.is_uniform)


def _restrided(op: OperatorCall) -> None:
    """The same positions in another memory layout; anything else that strides can do is not followed."""
    x = op.operands[0]
    info = op.info(x)
    if tuple(op.args[1]) == tuple(x.shape) and op.name == "as_strided_":
        op.set_labels(op.output, info.labels, info.zero_dims, info.is_uniform)
    else:
        unknown(op)


def _in_place_fill(op: OperatorCall) -> None:
    """The positions stay, the values are new."""
    _note_partial_write(op)
    target = op.operands[0]
    info = op.info(target)
    op.set_labels(op.output, info.labels, (), info.is_uniform)


def unknown(op: OperatorCall) -> None:
    """No rule: what goes in stays as it is."""
    for tensor in op.operands:
        for label in op.info(tensor).labels:
            op.freeze(label, f"no rule for the operator '{op.name}'; gflow_pl.register_rule adds one")
    flat: list[Any] = list(op.output) if isinstance(op.output, (tuple, list)) else [op.output]
    for out in flat:
        if isinstance(out, Tensor) and not any(out is tensor for tensor in op.operands):
            op.set_labels(out, [None] * out.ndim)
        elif isinstance(out, Tensor):
            whole = out if out._base is None else out._base
            op.info(out).is_uniform = op.info(whole).is_uniform = False  # what was written is not known


_WRITES = frozenset(["copy_", "add_", "mul_", "sub_", "div_"])
_NAMES: dict[Rule, str] = {
    pointwise: """copy copy_ gelu dropout native_dropout hardswish hardsigmoid elu celu selu leaky_relu hardtanh relu relu6 silu
        mish threshold softplus log_sigmoid log_sigmoid_forward prelu _prelu_kernel rrelu_with_noise clamp where masked_fill
        rsub softshrink hardshrink add sub mul div addcmul addcdiv lerp pow""",
    _like: "zeros_like ones_like empty_like full_like rand_like randn_like bernoulli",
    _filled: "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor",
    _new: "arange rand randn randint randperm linspace eye tril_indices empty_strided new_empty_strided",
    _same: "detach alias clone contiguous _to_copy to lift_fresh lift resolve_conj resolve_neg",
    _restrided: "as_strided as_strided_",
    _in_place_fill: "zero_ fill_ bernoulli_ uniform_ normal_ random_ exponential_",
}
ELEMENTWISE: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}

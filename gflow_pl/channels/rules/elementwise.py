"""Rules of ops that work position by position, make new tensors, or only copy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from gflow_pl.channels.constraints import Auxiliary
from gflow_pl.channels.recorder import DimLabels, Op, Recorder, Rule

__all__ = ["ELEMENTWISE", "pointwise", "unknown"]

# f(0) = 0 whatever the other arguments are
_ZERO_AT_ZERO = """abs alias alpha_dropout clone celu ceil contiguous detach dropout elu erf expm1 fix floor gelu hardswish leaky_relu
    lift_fresh log1p mish native_dropout neg _prelu_kernel prelu relu relu6 round rrelu_with_noise selu sgn sign silu sin
    sinh softshrink sqrt square tan tanh threshold _to_copy to asin asinh atan atanh hardshrink"""
_KEEPS_ZERO = frozenset(_ZERO_AT_ZERO.split())
# zero where the first operand is zero
_ZERO_WITH_FIRST = frozenset(["div", "floor_divide", "pow", "true_divide", "hardtanh", "fmod", "remainder"])
_UNCHANGED = "meets a tensor whose channels are not known"


def pointwise(t: Recorder, op: Op) -> None:
    """Right-aligned, dim by dim: all operands of the full width are position by position the same."""
    outs = [out for out in (op.out if isinstance(op.out, (tuple, list)) else [op.out]) if isinstance(out, Tensor)]
    if not outs:
        return
    if op.name.endswith("_"):
        _note_partial_write(t, op)
    if op.name in _WRITES and _writes_into_unknown(t, op):
        return
    tags = [t.tag(tensor) for tensor in op.tensors]
    for out in outs:
        if tags and all([tag.uniform for tag in tags]):
            t.put(out, [None] * out.ndim, uniform=True)
        elif len(tags) == 1 and out.shape == op.tensors[0].shape:
            t.put(out, tags[0].labels, _zero_dims(t, op, out))
        else:
            t.put(out, _aligned(t, op, out), _zero_dims(t, op, out))


def _aligned(t: Recorder, op: Op, out: Tensor) -> DimLabels:
    merged: DimLabels = [None] * out.ndim
    for dim, size in enumerate(out.shape):
        back = dim - out.ndim
        present = [x for x in op.tensors if x.ndim >= -back and not t.tag(x).uniform]
        full = [(x, t.tag(x).labels[back]) for x in present if x.shape[back] == size]
        labelled = [(x, label) for x, label in full if label is not None]
        for x in present:
            if x.shape[back] != size:
                t.constraints.freeze(t.tag(x).labels[back], "a single channel that is broadcast to many")
        if not labelled:
            continue
        merged[dim] = labelled[0][1]
        if len(labelled) < len(full):
            for _, label in labelled:
                t.constraints.freeze(label, _UNCHANGED)
            continue
        adding = op.name.removesuffix("_") in ("add", "sub") and size > 1
        for (a, first), (b, other) in pairwise(labelled):
            if adding and t.tag(a).active and t.tag(b).active and first is not other:
                # What comes out belongs to neither operand alone: nodes of its own.
                merged[dim] = own = t.constraints.new_labels(Auxiliary.SUM, size)
                t.constraints.adds.append((first, other))
                t.constraints.join(own, first)
            else:
                t.constraints.join(first, other)
    return merged


def _zero_dims(t: Recorder, op: Op, out: Tensor) -> set[int]:
    """Dims of the output along which a removed unit leaves zeros."""
    name = op.name.removesuffix("_")
    tensors = [(x, t.tag(x)) for x in op.tensors]
    # A single channel that meets many is no zero at their places.
    shifts = [out.ndim - x.ndim for x, _ in tensors]
    aligned = [
        {dim + shift for dim in tag.zero if x.shape[dim] == out.shape[dim + shift]}
        for (x, tag), shift in zip(tensors, shifts, strict=True)
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


def _note_partial_write(t: Recorder, op: Op) -> None:
    """Of a tensor that one number fills, a part now holds others."""
    target = op.tensors[0]
    if target._base is not None and target.numel() < target._base.numel():
        t.tag(target).uniform = t.tag(target._base).uniform = False


def _writes_into_unknown(t: Recorder, op: Op) -> bool:
    """In-place writes: a view of a tensor that has no labels of its own would lose those of what is written."""
    target = op.tensors[0]
    tag = t.tag(target)
    written = [x for x in op.tensors[1:] if any(label is not None for label in t.tag(x).labels)]
    if target._base is None or not written:
        if target._base is None and op.name == "copy_" and tag.uniform and len(op.tensors) > 1:
            source = t.tag(op.tensors[1])
            if target.shape == op.tensors[1].shape:
                t.put(target, source.labels, source.zero, source.uniform)
                return True
        return False
    if tag.uniform or all(label is None for label in tag.labels) or t.tag(target._base).uniform:
        for x in written:
            for label in t.tag(x).labels:
                t.constraints.freeze(label, "written into a slice of a tensor that was made elsewhere")
        base = t.tag(target._base)
        base.uniform = False
        tag.uniform = False
        return True
    return False


def _like(t: Recorder, op: Op) -> None:
    """A new tensor of a known tensor's shape."""
    tag = t.tag(op.tensors[0])
    zero = range(op.out.ndim) if op.name == "zeros_like" else ()
    t.put(op.out, tag.labels, zero, tag.uniform)


def _filled(t: Recorder, op: Op) -> None:
    """One number everywhere: its size follows whatever it meets, and the probe sees whether that is right."""
    t.put(op.out, [None] * op.out.ndim, uniform=True)


def _new(t: Recorder, op: Op) -> None:
    """A new tensor of a shape that was given in numbers."""
    for out in op.out if isinstance(op.out, (tuple, list)) else [op.out]:
        t.put(out, [None] * out.ndim)


def _same(t: Recorder, op: Op) -> None:
    """Nothing but a copy or another view of the same positions."""
    tag = t.tag(op.tensors[0])
    t.put(op.out, tag.labels, tag.zero, tag.uniform)


def _restrided(t: Recorder, op: Op) -> None:
    """The same positions in another memory layout; anything else that strides can do is not followed."""
    x = op.tensors[0]
    tag = t.tag(x)
    if tuple(op.args[1]) == tuple(x.shape) and op.name == "as_strided_":
        t.put(op.out, tag.labels, tag.zero, tag.uniform)
    else:
        unknown(t, op)


def _in_place_fill(t: Recorder, op: Op) -> None:
    """The positions stay, the values are new."""
    _note_partial_write(t, op)
    target = op.tensors[0]
    tag = t.tag(target)
    t.put(op.out, tag.labels, (), tag.uniform)


def unknown(t: Recorder, op: Op) -> None:
    """No rule: what goes in stays as it is."""
    for tensor in op.tensors:
        for label in t.labels(tensor):
            t.constraints.freeze(label, f"no rule for the op '{op.name}'")
    flat: list[Any] = list(op.out) if isinstance(op.out, (tuple, list)) else [op.out]
    for out in flat:
        if isinstance(out, Tensor) and not any(out is tensor for tensor in op.tensors):
            t.put(out, [None] * out.ndim)
        elif isinstance(out, Tensor):
            whole = out if out._base is None else out._base
            t.tag(out).uniform = t.tag(whole).uniform = False  # what was written is not known


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

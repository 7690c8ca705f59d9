"""Rules of operators that join tensors or pad one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gflow_pl.channels.constraints import FIXED
from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["JOINING_RULES"]


def _cat(op: OperatorCall) -> None:
    """Label the output of ``cat(tensors, dim=0)``.

    The labels are concatenated along the dimension, and match in all others.
    """
    parts = [x for x in op.operands if x.shape != (0,)]  # cat ignores such tensors
    joined = op.arg(1, "dim", 0) % op.output.ndim
    infos = [op.info(x) for x in parts]
    if all(info.is_uniform for info in infos):
        op.set_labels(op.output, [None] * op.output.ndim, is_uniform=True)
        return

    labels = _matched_labels(op, parts, except_dim=joined)
    if any(info.labels[joined] is not None for info in infos):
        # Positions of a part without labels stay.
        vectors = [_labels_or_fixed(info.labels[joined], x.shape[joined]) for info, x in zip(infos, parts, strict=True)]
        labels[joined] = np.concatenate(vectors)

    # Positions that stay do not matter for the zeros along the joined dimension.
    zero_dims = [info.zero_dims | ({joined} if info.labels[joined] is None else set()) for info in infos]
    op.set_labels(op.output, labels, frozenset.intersection(*zero_dims))


def _labels_or_fixed(labels: np.ndarray | None, size: int) -> np.ndarray:
    return np.full(size, FIXED, np.int64) if labels is None else labels


def _matched_labels(op: OperatorCall, parts: Sequence[Tensor], except_dim: int | None) -> DimLabels:
    """Match the labels of all tensors in every dimension but one, and return those of the first tensor.

    Args:
        op: The call.
        parts: The tensors. Uniform tensors are left out, because they fit any channels.
        except_dim: The dimension that is not matched. Its labels are returned as None.
    """
    infos = [op.info(x) for x in parts if not op.info(x).is_uniform]
    labels: DimLabels = [None] * parts[0].ndim
    for dim in range(parts[0].ndim):
        vectors = [info.labels[dim] for info in infos]
        if dim == except_dim or all(vector is None for vector in vectors):
            continue
        for other in vectors[1:]:
            op.match(vectors[0], other, "put together with a tensor whose channels are not known")
        labels[dim] = vectors[0]
    return labels


def _stack(op: OperatorCall) -> None:
    """Label the output of ``stack(tensors, dim=0)``."""
    new = op.arg(1, "dim", 0) % op.output.ndim
    labels = _matched_labels(op, op.operands, except_dim=None)
    zero_dims = frozenset.intersection(*[op.info(x).zero_dims for x in op.operands])
    op.set_labels(op.output, [*labels[:new], None, *labels[new:]], [dim + (dim >= new) for dim in zero_dims])


def _pad_with_constant(op: OperatorCall) -> None:
    """Label the output of ``constant_pad_nd(x, pad, value=0)``.

    Positions that are added stay. Channels that are cropped are frozen.
    """
    x, pads = op.operands[0], list(op.args[1])
    info = op.info(x)
    labels = list(info.labels)
    for i in range(len(pads) // 2):  # from the last dimension to the first
        before, after = pads[2 * i : 2 * i + 2]
        vector = labels[-1 - i]
        if vector is None or before == after == 0:
            continue
        if before < 0 or after < 0:
            op.freeze(vector, "channels are cropped")
            labels[-1 - i] = None
        else:
            labels[-1 - i] = np.concatenate([_labels_or_fixed(None, before), vector, _labels_or_fixed(None, after)])
    op.set_labels(op.output, labels, info.zero_dims if not op.arg(2, "value", 0) else ())


def _pad_with_border(op: OperatorCall) -> None:
    """Padding by reflection, replication or wrapping: the padded dimensions are frozen."""
    x = op.operands[0]
    info = op.info(x)
    num_padded = len(op.args[1]) // 2
    first = x.ndim - num_padded
    for vector in info.labels[first:]:
        op.freeze(vector, "a padded dim")
    labels = [*info.labels[:first], *[None] * num_padded]
    op.set_labels(op.output, labels, [dim for dim in info.zero_dims if dim < first])


_NAMES: dict[Rule, str] = {
    _cat: "cat concat",
    _stack: "stack",
    _pad_with_constant: "constant_pad_nd",
    _pad_with_border: """reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d _pad_circular""",
}
JOINING_RULES = rule_table(_NAMES)

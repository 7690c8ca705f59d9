"""Rules of reductions and of ops that mix the positions along a dim: sums, means, softmax, pools."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule

__all__ = ["REDUCTIONS"]

_ADDS_UP = frozenset(["sum", "linalg_vector_norm", "norm", "count_nonzero"])
_AVERAGES = frozenset(["mean", "var", "std", "var_mean", "std_mean", "logsumexp"])


def _dims(op: OperatorCall, position: int, ndim: int) -> tuple[int, ...]:
    """The dims that go, all of them where none are named."""
    dims: Any = op.kwargs.get("dim", op.args[position] if position < len(op.args) else None)
    if dims is None or isinstance(dims, bool) or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(ndim))
    return tuple(dim % ndim for dim in (dims if isinstance(dims, (list, tuple)) else (dims,)))


def _reduce(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    position = 2 if op.name in ("linalg_vector_norm", "norm") else 1
    gone = _dims(op, position, x.ndim) if x.ndim else ()
    for dim in gone:
        label = info.labels[dim]
        if label is None or (op.name in _ADDS_UP and dim in info.zero_dims):
            continue
        if op.name in _ADDS_UP | _AVERAGES:
            op.mark_inexact(label, f"'{op.name}' over the pruned dim")
        else:
            op.freeze(label, f"'{op.name}' over the channels")
    for out in op.output if isinstance(op.output, (tuple, list)) else [op.output]:
        if out.ndim == x.ndim:
            labels: DimLabels = [None if dim in gone else label for dim, label in enumerate(info.labels)]
            op.set_labels(
                out, labels, (info.zero_dims - set(gone)) if op.name in ("sum", "mean", "amax", "amin") else ()
            )
        else:
            kept = [dim for dim in range(x.ndim) if dim not in gone]
            zero = [
                i for i, dim in enumerate(kept) if dim in info.zero_dims and op.name in ("sum", "mean", "amax", "amin")
            ]
            op.set_labels(out, [info.labels[dim] for dim in kept][: out.ndim], zero)


def _along(op: OperatorCall) -> None:
    """Softmax, cumulative sums: every position along the dim depends on the others."""
    x = op.operands[0]
    info = op.info(x)
    dim = op.arg(1, "dim") % x.ndim
    op.mark_inexact(info.labels[dim], f"'{op.name.strip('_')}' along the pruned dim")
    for out in op.output if isinstance(op.output, (tuple, list)) else [op.output]:
        op.set_labels(out, info.labels, info.zero_dims - {dim} if op.name == "cumsum" else ())


def _order(op: OperatorCall) -> None:
    """Sorting, the largest few: what is chosen depends on what is there."""
    x = op.operands[0]
    info = op.info(x)
    position = 2 if op.name == "topk" else 1
    dim = op.arg(position, "dim", -1)
    dim = (dim if isinstance(dim, int) and not isinstance(dim, bool) else -1) % max(x.ndim, 1)
    op.freeze(info.labels[dim], f"'{op.name}' over the channels")
    for out in op.output if isinstance(op.output, (tuple, list)) else [op.output]:
        op.set_labels(out, [None if i == dim else label for i, label in enumerate(info.labels)])


def _spatial(op: OperatorCall) -> None:
    """Pools and resizing: batch and channels pass, the dims behind them must not move."""
    x = op.operands[0]
    info = op.info(x)
    digits = [int(char) for char in op.name if char.isdigit()]
    behind = digits[0] if digits else max(x.ndim - 2, 1)
    first = x.ndim - behind
    for dim in range(first, x.ndim):
        op.freeze(info.labels[dim], "a spatial dim of a pooling or resizing op")
    zero: Iterable[int] = [dim for dim in info.zero_dims if dim < first]
    for out in op.output if isinstance(op.output, (tuple, list)) else [op.output]:
        if isinstance(out, Tensor):
            op.set_labels(out, [*info.labels[:first], *[None] * behind], zero, info.is_uniform)


_NAMES: dict[Rule, str] = {
    _reduce: """sum mean var std var_mean std_mean linalg_vector_norm norm amax amin max min argmax argmin prod any all
        logsumexp count_nonzero aminmax""",
    _along: "_softmax softmax _log_softmax log_softmax _safe_softmax cumsum cumprod logcumsumexp",
    _order: "sort topk argsort kthvalue median mode msort",
    _spatial: """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
        _adaptive_avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d mkldnn_max_pool2d quantized_max_pool2d fractional_max_pool2d upsample_nearest1d upsample_nearest2d
        upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d
        upsample_trilinear3d upsample_linear1d _upsample_bilinear2d_aa _upsample_bicubic2d_aa""",
}
REDUCTIONS: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}

"""Rules of reductions and of ops that mix the positions along a dim: sums, means, softmax, pools."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gflow_pl.channels.recorder import DimLabels, Op, Recorder, Rule

__all__ = ["REDUCTIONS"]

_ADDS_UP = frozenset(["sum", "linalg_vector_norm", "norm", "count_nonzero"])
_AVERAGES = frozenset(["mean", "var", "std", "var_mean", "std_mean", "logsumexp"])


def _dims(op: Op, position: int, ndim: int) -> tuple[int, ...]:
    """The dims that go, all of them where none are named."""
    dims: Any = op.kwargs.get("dim", op.args[position] if position < len(op.args) else None)
    if dims is None or isinstance(dims, bool) or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(ndim))
    return tuple(dim % ndim for dim in (dims if isinstance(dims, (list, tuple)) else (dims,)))


def _reduce(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    position = 2 if op.name in ("linalg_vector_norm", "norm") else 1
    gone = _dims(op, position, x.ndim) if x.ndim else ()
    for dim in gone:
        label = tag.labels[dim]
        if label is None or (op.name in _ADDS_UP and dim in tag.zero):
            continue
        if op.name in _ADDS_UP | _AVERAGES:
            t.constraints.mark_inexact(label, f"'{op.name}' over the pruned dim")
        else:
            t.constraints.freeze(label, f"'{op.name}' over the channels")
    for out in op.out if isinstance(op.out, (tuple, list)) else [op.out]:
        if out.ndim == x.ndim:
            labels: DimLabels = [None if dim in gone else label for dim, label in enumerate(tag.labels)]
            t.put(out, labels, (tag.zero - set(gone)) if op.name in ("sum", "mean", "amax", "amin") else ())
        else:
            kept = [dim for dim in range(x.ndim) if dim not in gone]
            zero = [i for i, dim in enumerate(kept) if dim in tag.zero and op.name in ("sum", "mean", "amax", "amin")]
            t.put(out, [tag.labels[dim] for dim in kept][: out.ndim], zero)


def _along(t: Recorder, op: Op) -> None:
    """Softmax, cumulative sums: every position along the dim depends on the others."""
    x = op.tensors[0]
    tag = t.tag(x)
    dim = op.arg(1, "dim") % x.ndim
    t.constraints.mark_inexact(tag.labels[dim], f"'{op.name.strip('_')}' along the pruned dim")
    for out in op.out if isinstance(op.out, (tuple, list)) else [op.out]:
        t.put(out, tag.labels, tag.zero - {dim} if op.name == "cumsum" else ())


def _order(t: Recorder, op: Op) -> None:
    """Sorting, the largest few: what is chosen depends on what is there."""
    x = op.tensors[0]
    tag = t.tag(x)
    position = 2 if op.name == "topk" else 1
    dim = op.arg(position, "dim", -1)
    dim = (dim if isinstance(dim, int) and not isinstance(dim, bool) else -1) % max(x.ndim, 1)
    t.constraints.freeze(tag.labels[dim], f"'{op.name}' over the channels")
    for out in op.out if isinstance(op.out, (tuple, list)) else [op.out]:
        t.put(out, [None if i == dim else label for i, label in enumerate(tag.labels)])


def _spatial(t: Recorder, op: Op) -> None:
    """Pools and resizing: batch and channels pass, the dims behind them must not move."""
    x = op.tensors[0]
    tag = t.tag(x)
    digits = [int(char) for char in op.name if char.isdigit()]
    behind = digits[0] if digits else max(x.ndim - 2, 1)
    first = x.ndim - behind
    for dim in range(first, x.ndim):
        t.constraints.freeze(tag.labels[dim], "a spatial dim of a pooling or resizing op")
    zero: Iterable[int] = [dim for dim in tag.zero if dim < first]
    for out in op.out if isinstance(op.out, (tuple, list)) else [op.out]:
        if isinstance(out, Tensor):
            t.put(out, [*tag.labels[:first], *[None] * behind], zero, tag.uniform)


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

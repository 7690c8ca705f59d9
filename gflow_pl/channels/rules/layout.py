"""Rules of ops that move, cut, join, repeat or pick positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.values import SizeAttribute

__all__ = ["LAYOUT"]

_SINGLE = "a single channel"
_UNCOUNTED = "a split with sizes that do not follow the channels"


def _moved(op: OperatorCall, order: list[int]) -> None:
    info = op.info(op.operands[0])
    op.set_labels(
        op.output,
        [info.labels[d] for d in order],
        [i for i, d in enumerate(order) if d in info.zero_dims],
        info.is_uniform,
    )


def _permute(op: OperatorCall) -> None:
    ndim = op.operands[0].ndim
    _moved(op, [d % ndim for d in op.args[1]])


def _transpose(op: OperatorCall) -> None:
    order = list(range(op.operands[0].ndim))
    a, b = (op.arg(1, "dim0"), op.arg(2, "dim1")) if op.name.startswith("transpose") else (0, len(order) - 1)
    if order:
        order[a], order[b] = order[b], order[a]
    _moved(op, order)


def _unsqueeze(op: OperatorCall) -> None:
    info = op.info(op.operands[0])
    dim = op.arg(1, "dim") % op.output.ndim
    labels: DimLabels = [*info.labels[:dim], None, *info.labels[dim:]]
    op.set_labels(op.output, labels, [d + (d >= dim) for d in info.zero_dims], info.is_uniform)


def _squeeze(op: OperatorCall) -> None:
    x = op.operands[0]
    dims = op.arg(1, "dim")
    named = (
        range(x.ndim) if dims is None else [d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    )
    gone = {d for d in named if x.shape[d] == 1}
    _drop(op, x, gone, op.output, _SINGLE)


def _drop(op: OperatorCall, x: Tensor, gone: set[int], out: Tensor, why: str) -> None:
    """The output is the input without these dims."""
    info = op.info(x)
    for dim in gone:
        op.freeze(info.labels[dim], why)
    kept = [dim for dim in range(x.ndim) if dim not in gone]
    op.set_labels(
        out, [info.labels[d] for d in kept], [i for i, d in enumerate(kept) if d in info.zero_dims], info.is_uniform
    )


def _select(op: OperatorCall) -> None:
    x = op.operands[0]
    dim = op.arg(1, "dim") % x.ndim
    for out in op.output if isinstance(op.output, (tuple, list)) else [op.output]:
        _drop(op, x, {dim}, out, "one index of the channels is read")


def _unbind(op: OperatorCall) -> None:
    x = op.operands[0]
    for out in op.output:
        _drop(op, x, {op.arg(1, "dim", 0) % x.ndim}, out, "one index of the channels is read")


def _expand(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    shift = op.output.ndim - x.ndim
    labels: DimLabels = [None] * shift
    for dim, label in enumerate(info.labels):
        same = x.shape[dim] == op.output.shape[dim + shift]
        if not same:
            op.freeze(label, "a single channel that is broadcast to many")
        labels.append(label if same else None)
    op.set_labels(op.output, labels, [d + shift for d in info.zero_dims], info.is_uniform)


def _repeat(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    shift = op.output.ndim - x.ndim
    labels: DimLabels = [None] * shift
    for label, times in zip(info.labels, op.args[1][shift:], strict=True):
        labels.append(None if label is None else np.tile(label, times))
    op.set_labels(op.output, labels, [d + shift for d in info.zero_dims], info.is_uniform)


def _flip(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    dims = {d % x.ndim for d in op.args[1]}
    labels = [label[::-1] if d in dims and label is not None else label for d, label in enumerate(info.labels)]
    op.set_labels(op.output, labels, info.zero_dims, info.is_uniform)


def _roll(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    for dim in {d % x.ndim for d in op.arg(2, "dims", ())} or set(range(x.ndim)):
        op.freeze(info.labels[dim], "channels are rolled")
    op.set_labels(op.output, info.labels, (), info.is_uniform)


def _pad(op: OperatorCall) -> None:
    x, pads = op.operands[0], list(op.args[1])
    info = op.info(x)
    labels = list(info.labels)
    for i in range(len(pads) // 2):
        before, after = pads[2 * i : 2 * i + 2]
        label = labels[-1 - i]
        if label is None or before == after == 0:
            continue
        if before < 0 or after < 0:
            op.freeze(label, "channels are cropped")
            labels[-1 - i] = None
        else:
            labels[-1 - i] = np.concatenate([np.zeros(before, np.int64), label, np.zeros(after, np.int64)])
    op.set_labels(op.output, labels, info.zero_dims if not op.arg(2, "value", 0) else ())


def _border(op: OperatorCall) -> None:
    """Reflection and replication: only dims that cannot change are padded."""
    x = op.operands[0]
    info = op.info(x)
    behind = len(op.args[1]) // 2
    for label in info.labels[x.ndim - behind :]:
        op.freeze(label, "a padded dim")
    op.set_labels(
        op.output,
        [*info.labels[: x.ndim - behind], *[None] * behind],
        [d for d in info.zero_dims if d < x.ndim - behind],
    )


def _cat(op: OperatorCall) -> None:
    parts = [x for x in op.operands if x.shape != (0,)]
    dim = op.arg(1, "dim", 0) % op.output.ndim
    infos = [op.info(x) for x in parts]
    if all(info.is_uniform for info in infos):
        op.set_labels(op.output, [None] * op.output.ndim, is_uniform=True)
        return
    labels = _agreed(op, parts, skip=dim)
    if any(info.labels[dim] is not None for info in infos):
        pieces = [info.labels[dim] for info in infos]
        filled = [np.zeros(x.shape[dim], np.int64) if p is None else p for x, p in zip(parts, pieces, strict=True)]
        labels[dim] = np.concatenate(filled)
    zero = set.intersection(
        *[set(info.zero_dims) | (set() if info.labels[dim] is not None else {dim}) for info in infos]
    )
    op.set_labels(op.output, labels, zero)


def _agreed(op: OperatorCall, parts: list[Tensor], skip: int | None) -> DimLabels:
    """DimLabels of dims along which all parts lie side by side."""
    known = [op.info(x) for x in parts if not op.info(x).is_uniform]
    labels: DimLabels = [None] * parts[0].ndim
    for dim in range(parts[0].ndim):
        found = [info.labels[dim] for info in known]
        if dim == skip or all(label is None for label in found):
            continue
        for other in found[1:]:
            op.match(found[0], other, "put together with a tensor whose channels are not known")
        labels[dim] = found[0]
    return labels


def _stack(op: OperatorCall) -> None:
    dim = op.arg(1, "dim", 0) % op.output.ndim
    labels = _agreed(op, list(op.operands), skip=None)
    zero = set.intersection(*[set(op.info(x).zero_dims) for x in op.operands])
    op.set_labels(op.output, [*labels[:dim], None, *labels[dim:]], [d + (d >= dim) for d in zero])


def _split(op: OperatorCall) -> None:
    """Cut into parts: sizes may be counted by the module, or be equal shares of what is there."""
    x = op.operands[0]
    info = op.info(x)
    dim = op.arg(2, "dim", 0) % x.ndim
    label = info.labels[dim]
    sizes = [part.shape[dim] for part in op.output]
    ends = np.cumsum(sizes)
    pieces = None if label is None else np.split(label, ends[:-1])
    if pieces is not None and len(pieces) > 1:
        _cut(op, pieces)
    for i, part in enumerate(op.output):
        labels = list(info.labels)
        labels[dim] = None if pieces is None else pieces[i]
        op.set_labels(part, labels, info.zero_dims, info.is_uniform)


def _cut(op: OperatorCall, pieces: list[Labels]) -> None:
    sizes = [len(piece) for piece in pieces]
    ways: list[Any] = []
    if "with_sizes" in op.name:
        ways += [names for names in (_listed(op, sizes), *_counted(op, sizes)) if names]
    equal = len(set(sizes)) == 1
    if equal:
        ways.append("equal")
    if equal and "with_sizes" not in op.name:
        ways += [[name] for name in op.size_attributes(sizes[0])]
        ways += [("whole", name) for name in op.size_attributes(sum(sizes))]
    way = op.choose(len(ways) + 1)
    if way == len(ways):
        for piece in pieces:
            op.freeze(piece, _UNCOUNTED)
        return
    if equal and (ways[way] == "equal" or "with_sizes" not in op.name):
        op.join_rows(np.stack(pieces, axis=1))
    if ways[way][0] == "whole":
        op.note_count(ways[way][1], np.concatenate(pieces))
    elif ways[way] != "equal":
        for name, piece in zip(ways[way], pieces, strict=False):
            if name is None:
                op.freeze(piece, _UNCOUNTED)
            else:
                op.note_count(name, piece)


def _listed(op: OperatorCall, sizes: list[int]) -> list[SizeAttribute]:
    """The running module keeps all the sizes in a list."""
    if op.module is None:
        return []
    for key, value in vars(op.module).items():
        if isinstance(value, (list, tuple)) and all(type(item) is int for item in value) and list(value) == sizes:
            return [SizeAttribute(op.module_name, key, i) for i in range(len(sizes))]
    return []


def _counted(op: OperatorCall, sizes: list[int]) -> list[list[SizeAttribute | None]]:
    """The running module keeps sizes in attributes of their own: all that it keeps follow, or those of one attribute."""
    found: list[SizeAttribute | None] = []
    for size in sizes:
        known = op.size_attributes(size)
        free = [name for name in known if name not in found]
        found.append(next(iter(free or known), None))
    names = list(dict.fromkeys(name for name in found if name is not None))
    alone = [[name if name == one else None for name in found] for one in names]
    return [found, *(alone if len(names) > 1 else [])] if names else []


def _slice(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    dim = op.arg(1, "dim", 0) % x.ndim
    label, size = info.labels[dim], x.shape[dim]
    labels = list(info.labels)
    if label is not None and op.output.shape[dim] != size:
        start, stop, step = slice(op.arg(2, "start"), op.arg(3, "end"), op.arg(4, "step", 1)).indices(size)
        labels[dim] = label[start:stop:step]
        _cut_slice(op, label, start, stop, step)
    op.set_labels(op.output, labels, info.zero_dims, info.is_uniform)


def _cut_slice(op: OperatorCall, label: Labels, start: int, stop: int, step: int) -> None:
    size, width = len(label), stop - start
    ways: list[Any] = []
    if step == 1 and width > 0 and size % width == 0 and start % width == 0:
        ways.append("equal")
    if step == 1 and start == 0 and 0 < stop < size:
        ways += [(name, label[:stop]) for name in op.size_attributes(stop)]
    if step == 1 and stop == size and 0 < start < size:
        ways += [(name, label[:start]) for name in op.size_attributes(start)]
    way = op.choose(len(ways) + 1)
    if way == len(ways):
        op.freeze(label, "a slice of the channels")
        return
    if ways[way] == "equal":
        op.join_rows(label.reshape(-1, width).T)
    else:
        op.note_count(*ways[way])
    if start:
        op.expect_argument(2, label[:start])


def _index(op: OperatorCall) -> None:
    x, picks = op.args[0], list(op.args[1])
    info = op.info(x)
    picked = [dim for dim, pick in enumerate(picks) if pick is not None]
    for pick in picks:
        for label in op.info(pick).labels if pick is not None else ():
            op.freeze(label, "positions that are looked up")
    for dim in picked:
        op.freeze(info.labels[dim], "channels are picked by an index")
    kept = [dim for dim in range(x.ndim) if dim not in picked]
    width = op.output.ndim - len(kept)
    together = picked == list(range(picked[0], picked[0] + len(picked))) if picked else True
    before = [dim for dim in kept if picked and dim < picked[0]] if together else []
    order: list[int | None] = [*before, *[None] * width, *[dim for dim in kept if dim not in before]]
    if width < 0 or len(order) != op.output.ndim:
        for label in info.labels:
            op.freeze(label, "channels are picked by a mask")
        order = [None] * op.output.ndim
    op.set_labels(
        op.output,
        [None if d is None else info.labels[d] for d in order],
        [i for i, d in enumerate(order) if d in info.zero_dims],
    )


def _index_select(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    dim = op.arg(1, "dim") % x.ndim
    op.freeze(info.labels[dim], "channels are picked by an index")
    # Whoever takes an entry out of the index takes out the position; the gather of an expansion does.
    picks = op.info(op.operands[1]).labels[0] if op.operands[1].ndim else None
    op.set_labels(
        op.output, [picks if d == dim else label for d, label in enumerate(info.labels)], info.zero_dims - {dim}
    )


def _index_copy(op: OperatorCall) -> None:
    """The scatter of an expansion: as many positions as the module puts out, in a tensor of a fixed width."""
    target, dim, index, source = op.args
    dim %= target.ndim
    op.match(op.info(index).labels[0], op.info(source).labels[dim], "channels are scattered")
    labels = [None if d == dim else label for d, label in enumerate(op.info(source).labels)]
    op.set_labels(op.output, labels, [d for d in op.info(source).zero_dims if d != dim])


def _pixel_shuffle(op: OperatorCall) -> None:
    x, factor = op.operands[0], op.arg(1, "upscale_factor", op.kwargs.get("downscale_factor"))
    info = op.info(x)
    label = info.labels[-3]
    for side in info.labels[-2:]:
        op.freeze(side, "a spatial dim")
    if label is not None and op.name == "pixel_shuffle":
        rows = label.reshape(-1, factor**2)
        op.join_rows(rows)
        label = rows[:, 0]
    elif label is not None:
        label = np.repeat(label, factor**2)
    op.set_labels(op.output, [*info.labels[:-3], label, None, None], info.zero_dims)


def _channel_shuffle(op: OperatorCall) -> None:
    info = op.info(op.operands[0])
    label = info.labels[1]
    if label is not None:
        rows = label.reshape(op.args[1], -1).T
        op.join_rows(rows)
        label = rows.reshape(-1)
    op.set_labels(op.output, [info.labels[0], label, *info.labels[2:]], info.zero_dims)


def _im2col(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    for side in info.labels[-2:]:
        op.freeze(side, "a spatial dim")
    label = info.labels[-3]
    times = op.output.shape[-2] // x.shape[-3]
    op.set_labels(
        op.output, [*info.labels[:-3], None if label is None else np.repeat(label, times), None], info.zero_dims
    )


def _col2im(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    label = info.labels[-2]
    op.freeze(info.labels[-1], "a spatial dim")
    if label is not None:
        rows = label.reshape(op.output.shape[-3], -1)
        op.join_rows(rows)
        label = rows[:, 0]
    op.set_labels(op.output, [*info.labels[:-2], label, None, None], info.zero_dims)


def _unfold(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    dim = op.arg(1, "dimension") % x.ndim
    op.freeze(info.labels[dim], "windows slide along the channels")
    labels: DimLabels = [*[None if d == dim else label for d, label in enumerate(info.labels)], None]
    op.set_labels(op.output, labels, info.zero_dims - {dim})


def _glu(op: OperatorCall) -> None:
    x = op.operands[0]
    info = op.info(x)
    dim = op.arg(1, "dim", -1) % x.ndim
    labels = list(info.labels)
    label = labels[dim]
    if label is not None:
        rows = label.reshape(2, -1).T
        op.join_rows(rows)
        labels[dim] = rows[:, 0]
    op.set_labels(op.output, labels, info.zero_dims)


def _triangle(op: OperatorCall) -> None:
    info = op.info(op.operands[0])
    for label in info.labels[-2:]:
        op.freeze(label, "a triangle of a matrix")
    op.set_labels(op.output, info.labels, (), info.is_uniform)


def _grid_sample(op: OperatorCall) -> None:
    x, grid = op.operands[:2]
    for label in (*op.info(x).labels[2:], *op.info(grid).labels):
        op.freeze(label, "positions that are sampled")
    op.set_labels(op.output, [*op.info(x).labels[:2], *[None] * (op.output.ndim - 2)], op.info(x).zero_dims & {0, 1})


_NAMES: dict[Rule, str] = {
    _permute: "permute",
    _transpose: "transpose t numpy_T",
    _unsqueeze: "unsqueeze",
    _squeeze: "squeeze",
    _select: "select",
    _unbind: "unbind",
    _expand: "expand broadcast_to",
    _repeat: "repeat",
    _flip: "flip",
    _roll: "roll",
    _pad: "constant_pad_nd",
    _border: """reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d _pad_circular""",
    _cat: "cat concat",
    _stack: "stack",
    _split: "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk",
    _slice: "slice",
    _index: "index",
    _index_select: "index_select",
    _index_copy: "index_copy",
    _pixel_shuffle: "pixel_shuffle pixel_unshuffle",
    _channel_shuffle: "channel_shuffle native_channel_shuffle",
    _im2col: "im2col",
    _col2im: "col2im",
    _unfold: "unfold",
    _glu: "glu",
    _triangle: "tril triu",
    _grid_sample: "grid_sampler_2d grid_sampler_3d",
}
LAYOUT: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}

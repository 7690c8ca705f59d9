"""Rules of ops that move, cut, join, repeat or pick positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.recorder import DimLabels, Op, Recorder, Rule
from gflow_pl.values import SizeAttribute

__all__ = ["LAYOUT"]

_SINGLE = "a single channel"
_UNCOUNTED = "a split with sizes that do not follow the channels"


def _moved(t: Recorder, op: Op, order: list[int]) -> None:
    tag = t.tag(op.tensors[0])
    t.put(op.out, [tag.labels[d] for d in order], [i for i, d in enumerate(order) if d in tag.zero], tag.uniform)


def _permute(t: Recorder, op: Op) -> None:
    ndim = op.tensors[0].ndim
    _moved(t, op, [d % ndim for d in op.args[1]])


def _transpose(t: Recorder, op: Op) -> None:
    order = list(range(op.tensors[0].ndim))
    a, b = (op.arg(1, "dim0"), op.arg(2, "dim1")) if op.name.startswith("transpose") else (0, len(order) - 1)
    if order:
        order[a], order[b] = order[b], order[a]
    _moved(t, op, order)


def _unsqueeze(t: Recorder, op: Op) -> None:
    tag = t.tag(op.tensors[0])
    dim = op.arg(1, "dim") % op.out.ndim
    labels: DimLabels = [*tag.labels[:dim], None, *tag.labels[dim:]]
    t.put(op.out, labels, [d + (d >= dim) for d in tag.zero], tag.uniform)


def _squeeze(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    dims = op.arg(1, "dim")
    named = (
        range(x.ndim) if dims is None else [d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    )
    gone = {d for d in named if x.shape[d] == 1}
    _drop(t, op, x, gone, op.out, _SINGLE)


def _drop(t: Recorder, op: Op, x: Tensor, gone: set[int], out: Tensor, why: str) -> None:
    """The output is the input without these dims."""
    tag = t.tag(x)
    for dim in gone:
        t.constraints.freeze(tag.labels[dim], why)
    kept = [dim for dim in range(x.ndim) if dim not in gone]
    t.put(out, [tag.labels[d] for d in kept], [i for i, d in enumerate(kept) if d in tag.zero], tag.uniform)


def _select(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    dim = op.arg(1, "dim") % x.ndim
    for out in op.out if isinstance(op.out, (tuple, list)) else [op.out]:
        _drop(t, op, x, {dim}, out, "one index of the channels is read")


def _unbind(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    for out in op.out:
        _drop(t, op, x, {op.arg(1, "dim", 0) % x.ndim}, out, "one index of the channels is read")


def _expand(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    shift = op.out.ndim - x.ndim
    labels: DimLabels = [None] * shift
    for dim, label in enumerate(tag.labels):
        same = x.shape[dim] == op.out.shape[dim + shift]
        if not same:
            t.constraints.freeze(label, "a single channel that is broadcast to many")
        labels.append(label if same else None)
    t.put(op.out, labels, [d + shift for d in tag.zero], tag.uniform)


def _repeat(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    shift = op.out.ndim - x.ndim
    labels: DimLabels = [None] * shift
    for label, times in zip(tag.labels, op.args[1][shift:], strict=True):
        labels.append(None if label is None else np.tile(label, times))
    t.put(op.out, labels, [d + shift for d in tag.zero], tag.uniform)


def _flip(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    dims = {d % x.ndim for d in op.args[1]}
    labels = [label[::-1] if d in dims and label is not None else label for d, label in enumerate(tag.labels)]
    t.put(op.out, labels, tag.zero, tag.uniform)


def _roll(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    for dim in {d % x.ndim for d in op.arg(2, "dims", ())} or set(range(x.ndim)):
        t.constraints.freeze(tag.labels[dim], "channels are rolled")
    t.put(op.out, tag.labels, (), tag.uniform)


def _pad(t: Recorder, op: Op) -> None:
    x, pads = op.tensors[0], list(op.args[1])
    tag = t.tag(x)
    labels = list(tag.labels)
    for i in range(len(pads) // 2):
        before, after = pads[2 * i : 2 * i + 2]
        label = labels[-1 - i]
        if label is None or before == after == 0:
            continue
        if before < 0 or after < 0:
            t.constraints.freeze(label, "channels are cropped")
            labels[-1 - i] = None
        else:
            labels[-1 - i] = np.concatenate([np.zeros(before, np.int64), label, np.zeros(after, np.int64)])
    t.put(op.out, labels, tag.zero if not op.arg(2, "value", 0) else ())


def _border(t: Recorder, op: Op) -> None:
    """Reflection and replication: only dims that cannot change are padded."""
    x = op.tensors[0]
    tag = t.tag(x)
    behind = len(op.args[1]) // 2
    for label in tag.labels[x.ndim - behind :]:
        t.constraints.freeze(label, "a padded dim")
    t.put(op.out, [*tag.labels[: x.ndim - behind], *[None] * behind], [d for d in tag.zero if d < x.ndim - behind])


def _cat(t: Recorder, op: Op) -> None:
    parts = [x for x in op.tensors if x.shape != (0,)]
    dim = op.arg(1, "dim", 0) % op.out.ndim
    tags = [t.tag(x) for x in parts]
    if all(tag.uniform for tag in tags):
        t.put(op.out, [None] * op.out.ndim, uniform=True)
        return
    labels = _agreed(t, parts, skip=dim)
    if any(tag.labels[dim] is not None for tag in tags):
        pieces = [tag.labels[dim] for tag in tags]
        filled = [np.zeros(x.shape[dim], np.int64) if p is None else p for x, p in zip(parts, pieces, strict=True)]
        labels[dim] = np.concatenate(filled)
    zero = set.intersection(*[set(tag.zero) | (set() if tag.labels[dim] is not None else {dim}) for tag in tags])
    t.put(op.out, labels, zero)


def _agreed(t: Recorder, parts: list[Tensor], skip: int | None) -> DimLabels:
    """DimLabels of dims along which all parts lie side by side."""
    known = [t.tag(x) for x in parts if not t.tag(x).uniform]
    labels: DimLabels = [None] * parts[0].ndim
    for dim in range(parts[0].ndim):
        found = [tag.labels[dim] for tag in known]
        if dim == skip or all(label is None for label in found):
            continue
        for other in found[1:]:
            t.meet(found[0], other, "put together with a tensor whose channels are not known")
        labels[dim] = found[0]
    return labels


def _stack(t: Recorder, op: Op) -> None:
    dim = op.arg(1, "dim", 0) % op.out.ndim
    labels = _agreed(t, op.tensors, skip=None)
    zero = set.intersection(*[set(t.tag(x).zero) for x in op.tensors])
    t.put(op.out, [*labels[:dim], None, *labels[dim:]], [d + (d >= dim) for d in zero])


def _split(t: Recorder, op: Op) -> None:
    """Cut into parts: sizes may be counted by the module, or be equal shares of what is there."""
    x = op.tensors[0]
    tag = t.tag(x)
    dim = op.arg(2, "dim", 0) % x.ndim
    label = tag.labels[dim]
    sizes = [part.shape[dim] for part in op.out]
    ends = np.cumsum(sizes)
    pieces = None if label is None else np.split(label, ends[:-1])
    if pieces is not None and len(pieces) > 1:
        _cut(t, op, pieces)
    for i, part in enumerate(op.out):
        labels = list(tag.labels)
        labels[dim] = None if pieces is None else pieces[i]
        t.put(part, labels, tag.zero, tag.uniform)


def _cut(t: Recorder, op: Op, pieces: list[Labels]) -> None:
    sizes = [len(piece) for piece in pieces]
    ways: list[Any] = []
    if "with_sizes" in op.name:
        ways += [names for names in (_listed(t, sizes), *_counted(t, sizes)) if names]
    equal = len(set(sizes)) == 1
    if equal:
        ways.append("equal")
    if equal and "with_sizes" not in op.name:
        ways += [[name] for name in t.attributes_like(sizes[0])]
        ways += [("whole", name) for name in t.attributes_like(sum(sizes))]
    way = t.choose(len(ways) + 1)
    if way == len(ways):
        for piece in pieces:
            t.constraints.freeze(piece, _UNCOUNTED)
        return
    if equal and (ways[way] == "equal" or "with_sizes" not in op.name):
        t.constraints.join_rows(np.stack(pieces, axis=1))
    if ways[way][0] == "whole":
        t.follows(ways[way][1], np.concatenate(pieces))
    elif ways[way] != "equal":
        for name, piece in zip(ways[way], pieces, strict=False):
            if name is None:
                t.constraints.freeze(piece, _UNCOUNTED)
            else:
                t.follows(name, piece)


def _listed(t: Recorder, sizes: list[int]) -> list[SizeAttribute]:
    """The running module keeps all the sizes in a list."""
    if not t.stack:
        return []
    name, module = t.stack[-1]
    for key, value in vars(module).items():
        if isinstance(value, (list, tuple)) and all(type(item) is int for item in value) and list(value) == sizes:
            return [SizeAttribute(name, key, i) for i in range(len(sizes))]
    return []


def _counted(t: Recorder, sizes: list[int]) -> list[list[SizeAttribute | None]]:
    """The running module keeps sizes in attributes of their own: all that it keeps follow, or those of one attribute."""
    found: list[SizeAttribute | None] = []
    for size in sizes:
        known = t.attributes_like(size)
        free = [name for name in known if name not in found]
        found.append(next(iter(free or known), None))
    names = list(dict.fromkeys(name for name in found if name is not None))
    alone = [[name if name == one else None for name in found] for one in names]
    return [found, *(alone if len(names) > 1 else [])] if names else []


def _slice(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    dim = op.arg(1, "dim", 0) % x.ndim
    label, size = tag.labels[dim], x.shape[dim]
    labels = list(tag.labels)
    if label is not None and op.out.shape[dim] != size:
        start, stop, step = slice(op.arg(2, "start"), op.arg(3, "end"), op.arg(4, "step", 1)).indices(size)
        labels[dim] = label[start:stop:step]
        _cut_slice(t, label, start, stop, step)
    t.put(op.out, labels, tag.zero, tag.uniform)


def _cut_slice(t: Recorder, label: Labels, start: int, stop: int, step: int) -> None:
    size, width = len(label), stop - start
    ways: list[Any] = []
    if step == 1 and width > 0 and size % width == 0 and start % width == 0:
        ways.append("equal")
    if step == 1 and start == 0 and 0 < stop < size:
        ways += [(name, label[:stop]) for name in t.attributes_like(stop)]
    if step == 1 and stop == size and 0 < start < size:
        ways += [(name, label[:start]) for name in t.attributes_like(start)]
    way = t.choose(len(ways) + 1)
    if way == len(ways):
        t.constraints.freeze(label, "a slice of the channels")
        return
    if ways[way] == "equal":
        t.constraints.join_rows(label.reshape(-1, width).T)
    else:
        t.follows(*ways[way])
    if start:
        t.expect(2, label[:start])


def _index(t: Recorder, op: Op) -> None:
    x, picks = op.args[0], list(op.args[1])
    tag = t.tag(x)
    picked = [dim for dim, pick in enumerate(picks) if pick is not None]
    for pick in picks:
        for label in t.labels(pick) if pick is not None else ():
            t.constraints.freeze(label, "positions that are looked up")
    for dim in picked:
        t.constraints.freeze(tag.labels[dim], "channels are picked by an index")
    kept = [dim for dim in range(x.ndim) if dim not in picked]
    width = op.out.ndim - len(kept)
    together = picked == list(range(picked[0], picked[0] + len(picked))) if picked else True
    before = [dim for dim in kept if picked and dim < picked[0]] if together else []
    order: list[int | None] = [*before, *[None] * width, *[dim for dim in kept if dim not in before]]
    if width < 0 or len(order) != op.out.ndim:
        for label in tag.labels:
            t.constraints.freeze(label, "channels are picked by a mask")
        order = [None] * op.out.ndim
    t.put(
        op.out, [None if d is None else tag.labels[d] for d in order], [i for i, d in enumerate(order) if d in tag.zero]
    )


def _index_select(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    dim = op.arg(1, "dim") % x.ndim
    t.constraints.freeze(tag.labels[dim], "channels are picked by an index")
    # Whoever takes an entry out of the index takes out the position; the gather of an expansion does.
    picks = t.labels(op.tensors[1])[0] if op.tensors[1].ndim else None
    t.put(op.out, [picks if d == dim else label for d, label in enumerate(tag.labels)], tag.zero - {dim})


def _index_copy(t: Recorder, op: Op) -> None:
    """The scatter of an expansion: as many positions as the module puts out, in a tensor of a fixed width."""
    target, dim, index, source = op.args
    dim %= target.ndim
    t.meet(t.labels(index)[0], t.labels(source)[dim], "channels are scattered")
    labels = [None if d == dim else label for d, label in enumerate(t.labels(source))]
    t.put(op.out, labels, [d for d in t.tag(source).zero if d != dim])


def _pixel_shuffle(t: Recorder, op: Op) -> None:
    x, factor = op.tensors[0], op.arg(1, "upscale_factor", op.kwargs.get("downscale_factor"))
    tag = t.tag(x)
    label = tag.labels[-3]
    for side in tag.labels[-2:]:
        t.constraints.freeze(side, "a spatial dim")
    if label is not None and op.name == "pixel_shuffle":
        rows = label.reshape(-1, factor**2)
        t.constraints.join_rows(rows)
        label = rows[:, 0]
    elif label is not None:
        label = np.repeat(label, factor**2)
    t.put(op.out, [*tag.labels[:-3], label, None, None], tag.zero)


def _channel_shuffle(t: Recorder, op: Op) -> None:
    tag = t.tag(op.tensors[0])
    label = tag.labels[1]
    if label is not None:
        rows = label.reshape(op.args[1], -1).T
        t.constraints.join_rows(rows)
        label = rows.reshape(-1)
    t.put(op.out, [tag.labels[0], label, *tag.labels[2:]], tag.zero)


def _im2col(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    for side in tag.labels[-2:]:
        t.constraints.freeze(side, "a spatial dim")
    label = tag.labels[-3]
    times = op.out.shape[-2] // x.shape[-3]
    t.put(op.out, [*tag.labels[:-3], None if label is None else np.repeat(label, times), None], tag.zero)


def _col2im(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    label = tag.labels[-2]
    t.constraints.freeze(tag.labels[-1], "a spatial dim")
    if label is not None:
        rows = label.reshape(op.out.shape[-3], -1)
        t.constraints.join_rows(rows)
        label = rows[:, 0]
    t.put(op.out, [*tag.labels[:-2], label, None, None], tag.zero)


def _unfold(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    dim = op.arg(1, "dimension") % x.ndim
    t.constraints.freeze(tag.labels[dim], "windows slide along the channels")
    labels: DimLabels = [*[None if d == dim else label for d, label in enumerate(tag.labels)], None]
    t.put(op.out, labels, tag.zero - {dim})


def _glu(t: Recorder, op: Op) -> None:
    x = op.tensors[0]
    tag = t.tag(x)
    dim = op.arg(1, "dim", -1) % x.ndim
    labels = list(tag.labels)
    label = labels[dim]
    if label is not None:
        rows = label.reshape(2, -1).T
        t.constraints.join_rows(rows)
        labels[dim] = rows[:, 0]
    t.put(op.out, labels, tag.zero)


def _triangle(t: Recorder, op: Op) -> None:
    tag = t.tag(op.tensors[0])
    for label in tag.labels[-2:]:
        t.constraints.freeze(label, "a triangle of a matrix")
    t.put(op.out, tag.labels, (), tag.uniform)


def _grid_sample(t: Recorder, op: Op) -> None:
    x, grid = op.tensors[:2]
    for label in (*t.labels(x)[2:], *t.labels(grid)):
        t.constraints.freeze(label, "positions that are sampled")
    t.put(op.out, [*t.labels(x)[:2], *[None] * (op.out.ndim - 2)], t.tag(x).zero & {0, 1})


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

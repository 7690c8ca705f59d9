"""Rules of reshaping: which old dims a new dim is made of, and what a split or a merge couples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gflow_pl.channels.book import Nodes
from gflow_pl.channels.recorder import Labels, Op, Recorder, Rule

__all__ = ["VIEWS"]

Dims = tuple[int, ...]


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[Dims, Dims]]:
    """The smallest runs of old and new dims that hold the same number of elements."""
    i = j = 0
    while i < len(old) and j < len(new):
        start_i, start_j = i, j
        left, right = old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        yield tuple(range(start_i, i)), tuple(range(start_j, j))
    if i < len(old) or j < len(new):
        yield tuple(range(i, len(old))), tuple(range(j, len(new)))


def _view(t: Recorder, op: Op) -> None:
    x, out = op.tensors[0], op.out
    tag = t.tag(x)
    labels: Labels = [None] * out.ndim
    if 0 in x.shape:
        for label in tag.labels:
            t.book.freeze(label, "a tensor without elements")
        t.put(out, labels, (), tag.uniform)
        return
    zero: set[int] = set()
    for olds, news in _blocks(x.shape, out.shape):
        if len(olds) == len(news) == 1:
            labels[news[0]] = tag.labels[olds[0]]
            zero |= {news[0]} if olds[0] in tag.zero else set()
            continue
        tracked = [dim for dim in olds if tag.labels[dim] is not None]
        for dim in tracked:
            if x.shape[dim] == 1:
                t.book.freeze(tag.labels[dim], "a single channel")
        tracked = [dim for dim in tracked if x.shape[dim] > 1]
        for dim in tracked[:-1]:
            t.book.freeze(tag.labels[dim], "merged with another dim whose channels move")
        if tracked:
            dim = tracked[-1]
            kept = _through_block(
                t, tag.labels[dim], olds.index(dim), [x.shape[d] for d in olds], [out.shape[d] for d in news]
            )
            if kept is not None:
                labels[news[0] + kept[0]] = kept[1]
                zero |= {news[0] + kept[0]} if dim in tag.zero else set()
    t.put(out, labels, zero, tag.uniform)


def _through_block(
    t: Recorder, label: Nodes | None, dim: int, old: list[int], new: list[int]
) -> tuple[int, Nodes] | None:
    """The new dim (within the block) that carries on the labels of an old one, and its labels."""
    assert label is not None
    shape = [1] * len(old)
    shape[dim] = old[dim]
    positions = np.broadcast_to(np.arange(old[dim]).reshape(shape), old).reshape(new)
    varying = [d for d in range(len(new)) if (positions != positions.take([0], axis=d)).any()]
    for d in range(len(new)):
        if d not in varying:
            positions = positions.take([0], axis=d)
    ways: list[tuple[int, tuple[str, str] | None]] = [(d, None) for d in reversed(varying)]
    ways += [(d, attribute) for d in varying for attribute in t.attributes_like(new[d])]
    if len(ways) == 1:
        kept, attribute = ways[0]
    else:
        choice = t.choose(len(ways) + 1)
        if choice == len(ways):
            t.book.freeze(label, "a view with sizes that do not follow the channels")
            return None
        kept, attribute = ways[choice]
    rows = np.moveaxis(positions, kept, 0).reshape(new[kept], -1)
    t.book.join_rows(label[rows])
    own = label[rows[:, 0]]
    if attribute is not None:
        t.follows(*attribute, own)
    return kept, own


VIEWS: dict[str, Rule] = dict.fromkeys(["view", "_unsafe_view", "reshape", "_reshape_alias"], _view)

"""Rules of reshaping: which old dims a new dim is made of, and what a split or a merge couples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.labels import DimLabels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.values import SizeAttribute

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


def _view(op: OperatorCall) -> None:
    x, out = op.operands[0], op.output
    info = op.info(x)
    before = _without_kernel(op, info.labels, x.shape)
    labels: DimLabels = [None] * out.ndim
    if 0 in x.shape:
        for label in info.labels:
            op.freeze(label, "a tensor without elements")
        op.set_labels(out, labels, (), info.is_uniform)
        return
    zero: set[int] = set()
    for olds, news in _blocks(x.shape, out.shape):
        if len(olds) == len(news) == 1:
            labels[news[0]] = _whole(op, before[olds[0]], news[0])
            zero |= {news[0]} if olds[0] in info.zero_dims else set()
            continue
        tracked = [dim for dim in olds if before[dim] is not None]
        for dim in tracked:
            if x.shape[dim] == 1:
                op.freeze(before[dim], "a single channel")
        tracked = [dim for dim in tracked if x.shape[dim] > 1]
        for dim in tracked[:-1]:
            op.freeze(before[dim], "merged with another dim whose channels move")
        if tracked:
            dim = tracked[-1]
            kept = _through_block(
                op, before[dim], olds.index(dim), [x.shape[d] for d in olds], [out.shape[d] for d in news]
            )
            if kept is not None:
                labels[news[0] + kept[0]] = kept[1]
                zero |= {news[0] + kept[0]} if dim in info.zero_dims else set()
    op.set_labels(out, labels, zero, info.is_uniform)


def _in_convolution(op: OperatorCall) -> bool:
    return isinstance(op.module, _ConvNd)


def _without_kernel(op: OperatorCall, labels: DimLabels, shape: Sequence[int]) -> DimLabels:
    """The dims of a convolution's kernel never move; so its inputs may be merged with them."""
    if not isinstance(op.module, _ConvNd) or tuple(shape[2:]) != tuple(op.module.kernel_size):
        return labels
    for label in labels[2:]:
        op.freeze(label, "a spatial dim of a kernel")
    return [*labels[:2], *[None] * len(labels[2:])]


def _whole(op: OperatorCall, label: Labels | None, dim: int) -> Labels | None:
    """A dim that stays one dim: its size may be one that the module keeps."""
    attributes: list[SizeAttribute] = []
    if label is not None and not (
        op.module is not None and type(op.module) is nn.Linear
    ):  # torch's own views ask the tensor
        attributes = [*op.size_attributes(len(label)), *_in_a_list(op, len(label))]
    choice = op.choose(len(attributes) + 1, priority=dim, is_certain=True) if attributes else 0
    if choice and label is not None:
        op.note_count(attributes[choice - 1], label)
    return label


def _in_a_list(op: OperatorCall, size: int) -> list[SizeAttribute]:
    """Sizes that the running module keeps in a tuple or list, such as a shape."""
    if op.module is None or size < 2:
        return []
    lists = [(key, value) for key, value in vars(op.module).items() if isinstance(value, (list, tuple))]
    return [
        SizeAttribute(op.module_name, key, i)
        for key, value in lists
        for i, item in enumerate(value)
        if type(item) is int and item == size
    ]


def _through_block(
    op: OperatorCall, label: Labels | None, dim: int, old: list[int], new: list[int]
) -> tuple[int, Labels] | None:
    """The new dim (within the block) that carries on the labels of an old one, and its labels."""
    assert label is not None
    shape = [1] * len(old)
    shape[dim] = old[dim]
    numbers = _first_alike(label) if _in_convolution(op) else np.arange(old[dim])
    positions = np.broadcast_to(numbers.reshape(shape), old).reshape(new)
    varying = [d for d in range(len(new)) if (positions != positions.take([0], axis=d)).any()]
    for d in range(len(new)):
        if d not in varying:
            positions = positions.take([0], axis=d)
    ways = _ways(op, new, varying)
    choice = (
        op.choose(len(ways) + 1, is_certain=len(varying) == 1, shared_key=(len(old), len(new))) if len(ways) > 1 else 0
    )
    if choice == len(ways):
        op.freeze(label, "a view with sizes that do not follow the channels")
        return None
    way = ways[choice]
    rows = np.moveaxis(positions, way.kept, 0).reshape(new[way.kept], -1)
    op.join_rows(label[rows])
    own = label[rows[:, 0]]
    if way.attribute is not None:
        op.note_count(way.attribute, own)
    if way.stream is not None:
        for column in way.stream.T:
            op.join(own, column)
    return way.kept, own


def _first_alike(label: Labels) -> Labels:
    """Per position, the first one of the same node: weights that were merged with the kernel come apart again."""
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return first[inverse]


@dataclass(frozen=True, eq=False)
class _Way:
    """One way to understand a view: which new dim keeps the channels, and what its size follows.

    Attributes:
        kept: The new dim that moves; over the others the channels are coupled.
        attribute: What counts its positions.
        stream: (positions, width) channels of the running module's input that its positions go with.
    """

    kept: int
    attribute: SizeAttribute | None = None
    stream: Labels | None = None


def _ways(op: OperatorCall, new: list[int], varying: list[int]) -> list[_Way]:
    """Sizes computed from the channels first, then sizes that the module keeps, then sizes of its input."""
    if len(varying) > 2 and new[varying[0]] <= 4:
        varying = varying[1:]  # a stack of queries, keys and values; its parts are told apart by number
    ways = [_Way(dim) for dim in reversed(varying)]
    ways += [_Way(dim, attribute) for dim in varying for attribute in op.size_attributes(new[dim])]
    for dim in reversed(varying):
        stream = _stream(op, new, dim)
        if stream is not None:
            attributes = op.size_attributes(new[dim]) if len(varying) > 1 else []
            ways += [_Way(dim, attribute, stream) for attribute in (None, *attributes[:2])]
    return ways


def _stream(op: OperatorCall, new: list[int], dim: int) -> Labels | None:
    """The input's channels that go with every position of the new dim, alone or together with a neighbouring dim."""
    own = op.input_channels(new[dim])
    if own is not None:
        return own[:, None]
    if dim + 1 < len(new) and (both := op.input_channels(new[dim] * new[dim + 1])) is not None:
        return both.reshape(new[dim], -1)
    if dim and (both := op.input_channels(new[dim - 1] * new[dim])) is not None:
        return both.reshape(-1, new[dim]).T
    return None


VIEWS: dict[str, Rule] = dict.fromkeys(["view", "_unsafe_view", "reshape", "_reshape_alias"], _view)

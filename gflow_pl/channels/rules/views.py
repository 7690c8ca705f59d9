"""The rule of reshaping: which dimension of the output holds the channels of a dimension of the input.

A view splits and merges dimensions. If channels are split into several dimensions (heads and their width, say), only
one of them can shrink, and all positions along the others belong to the same units. Which one it is follows from where
the code takes the sizes from, so the rule lists the interpretations that are possible, and `OperatorCall.choose` picks
one.
"""

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
from gflow_pl.values.expansion_names import plain_class

__all__ = ["VIEW_RULES"]

Dims = tuple[int, ...]


def _view(op: OperatorCall) -> None:
    """Label the output of ``view(x, sizes)`` and ``reshape(x, sizes)``."""
    x, output = op.operands[0], op.output
    info = op.info(x)
    before = _labels_without_kernel(op, info.labels, x.shape)
    labels: DimLabels = [None] * output.ndim
    if 0 in x.shape:
        for vector in info.labels:
            op.freeze(vector, "a tensor without elements")
        op.set_labels(output, labels, (), info.is_uniform)
        return

    zero_dims: set[int] = set()
    for old_dims, new_dims in _blocks(x.shape, output.shape):
        # A dimension that is not reshaped.
        if len(old_dims) == len(new_dims) == 1:
            labels[new_dims[0]] = _unchanged_dim(op, before[old_dims[0]], new_dims[0])
            zero_dims |= {new_dims[0]} if old_dims[0] in info.zero_dims else set()
            continue

        # Of several dimensions with channels that are merged, only the last one can be pruned. One that was broadcast
        # keeps its size if it is merged with channels.
        labelled = [dim for dim in old_dims if before[dim] is not None]
        broadcast = [dim for dim in labelled if op.is_broadcast(before[dim])]
        if len(broadcast) < len(labelled):
            for dim in broadcast:
                op.freeze(before[dim], "a broadcast dim that is merged with channels")
            labelled = [dim for dim in labelled if dim not in broadcast]
        for dim in labelled:
            if x.shape[dim] == 1:
                op.freeze(before[dim], "a single channel")
        labelled = [dim for dim in labelled if x.shape[dim] > 1]
        for dim in labelled[:-1]:
            op.freeze(before[dim], "merged with another dim whose channels move")
        if not labelled:
            continue

        # Its channels continue in one of the new dimensions.
        dim = labelled[-1]
        vector = before[dim]
        assert vector is not None
        old_sizes, new_sizes = [x.shape[d] for d in old_dims], [output.shape[d] for d in new_dims]
        found = _reshaped_dim(op, vector, old_dims.index(dim), old_sizes, new_sizes)
        if found is not None:
            new_dim = new_dims[found[0]]
            labels[new_dim] = found[1]
            zero_dims |= {new_dim} if dim in info.zero_dims else set()
    op.set_labels(output, labels, zero_dims, info.is_uniform)


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[Dims, Dims]]:
    """Yield the smallest runs of old and new dimensions that hold the same number of elements.

    Args:
        old: Shape before.
        new: Shape after, with as many elements.

    Example:
        >>> list(_blocks((2, 12, 5), (2, 3, 4, 5)))
        [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]
    """
    i = j = 0
    while i < len(old) and j < len(new):
        first_i, first_j = i, j
        old_product, new_product = old[i], new[j]
        i, j = i + 1, j + 1
        while old_product != new_product:
            if old_product < new_product:
                old_product, i = old_product * old[i], i + 1
            else:
                new_product, j = new_product * new[j], j + 1
        yield tuple(range(first_i, i)), tuple(range(first_j, j))
    if i < len(old) or j < len(new):  # dimensions of size 1 at the end
        yield tuple(range(i, len(old))), tuple(range(j, len(new)))


def _labels_without_kernel(op: OperatorCall, labels: DimLabels, shape: Sequence[int]) -> DimLabels:
    """Freeze the kernel's dimensions if the operand is the weight of a running convolution; return the other labels.

    A convolution that computes its weight (weight standardization) merges its input channels with the kernel. Without
    the labels of the kernel, the merged dimension can shrink with the channels.
    """
    if not isinstance(op.module, _ConvNd) or tuple(shape[2:]) != tuple(op.module.kernel_size):
        return labels
    for vector in labels[2:]:
        op.freeze(vector, "a spatial dim of a kernel")
    return [*labels[:2], *[None] * len(labels[2:])]


def _unchanged_dim(op: OperatorCall, labels: Labels | None, dim: int) -> Labels | None:
    """Return the labels of a dimension that a view leaves as it is.

    The code may take its size from the tensor, or from an attribute of the module. Linear layers take it from the
    tensor.
    """
    attributes: list[SizeAttribute] = []
    if labels is not None and plain_class(op.module) is not nn.Linear:
        attributes = [*op.size_attributes(len(labels)), *_list_elements(op, len(labels))]
    choice = op.choose(len(attributes) + 1, priority=dim, is_certain=True) if attributes else 0
    if choice and labels is not None:
        op.note_count(attributes[choice - 1], labels)
    return labels


def _list_elements(op: OperatorCall, size: int) -> list[SizeAttribute]:
    """Return the elements of this value in lists and tuples, such as shapes, that the running module holds."""
    if size < 2:
        return []
    return [
        SizeAttribute(op.module_name, name, i)
        for name, value in op.sequence_attributes()
        for i, item in enumerate(value)
        if type(item) is int and item == size
    ]


@dataclass(frozen=True, eq=False)
class _Interpretation:
    """Which new dimension of a view holds the channels, and what its size follows.

    Attributes:
        dim: The new dimension that shrinks. All positions along the others of its block belong to the same units.
        attribute: The attribute that is its size; None if the size is computed from the tensor.
        input_labels: (positions, width) labels of the running module's input, which every position goes with; None if
            the size does not follow from the input.
    """

    dim: int
    attribute: SizeAttribute | None = None
    input_labels: Labels | None = None


def _reshaped_dim(
    op: OperatorCall, labels: Labels, dim: int, old: Sequence[int], new: Sequence[int]
) -> tuple[int, Labels] | None:
    """Choose the new dimension that holds the channels of an old one, and add the constraints that follow.

    Args:
        op: The call of view.
        labels: Labels of the old dimension.
        dim: The old dimension, counted within its block.
        old: Sizes of the old dimensions of the block.
        new: Sizes of the new dimensions of the block.

    Returns:
        The new dimension within the block and its labels; None if the channels are frozen.
    """
    # For every element of the block its position along the old dimension, in the new shape.
    shape = [1] * len(old)
    shape[dim] = old[dim]
    positions = np.broadcast_to(_first_positions(labels).reshape(shape), old).reshape(new)

    # New dimensions along which the position changes; of the others, one element is enough.
    varying = [d for d in range(len(new)) if (positions != positions.take([0], axis=d)).any()]
    for d in range(len(new)):
        if d not in varying:
            positions = positions.take([0], axis=d)

    interpretations = _interpretations(op, new, varying)
    choice = 0
    if len(interpretations) > 1:
        is_certain, shared_key = len(varying) == 1, (len(old), len(new), len(varying))
        choice = op.choose(len(interpretations) + 1, is_certain=is_certain, shared_key=shared_key)
    if choice == len(interpretations):
        op.freeze(labels, "a view with sizes that do not follow the channels")
        return None

    # All positions that share an index of the chosen dimension belong to one unit.
    chosen = interpretations[choice]
    rows = np.moveaxis(positions, chosen.dim, 0).reshape(new[chosen.dim], -1)
    op.join_rows(labels[rows])
    new_labels = labels[rows[:, 0]]
    if chosen.attribute is not None:
        op.note_count(chosen.attribute, new_labels)
    if chosen.input_labels is not None:
        for column in chosen.input_labels.T:
            op.join(new_labels, column)
    return chosen.dim, new_labels


def _first_positions(labels: Labels) -> np.ndarray:
    """Return, for every position, the first position with the same label.

    A dimension that was merged with another one (heads with examples, input channels with a kernel) has each label
    several times. Where it is split again, the channels are in the dimension along which the label changes. A single
    label for all positions tells nothing: they count as different.
    """
    unique, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse] if len(unique) > 1 else np.arange(len(labels))


def _interpretations(op: OperatorCall, new: Sequence[int], varying: Sequence[int]) -> list[_Interpretation]:
    """Return the possible interpretations of a view, likely ones first.

    First come sizes that are computed from the tensor, then sizes from attributes of the running module, then sizes of
    its input.

    Args:
        op: The call of view.
        new: Sizes of the new dimensions.
        varying: New dimensions along which the channel changes.
    """
    if len(varying) > 2 and new[varying[0]] <= 4:
        varying = varying[1:]  # a stack of queries, keys and values, which the code takes apart by index
    found = [_Interpretation(dim) for dim in reversed(varying)]
    found += [_Interpretation(dim, attribute) for dim in varying for attribute in op.size_attributes(new[dim])]
    found += [_Interpretation(dim, element) for dim in varying for element in _list_elements(op, new[dim])]
    for dim in reversed(varying):
        input_labels = _input_labels(op, new, dim)
        if input_labels is not None:
            attributes = op.size_attributes(new[dim]) if len(varying) > 1 else []
            found += [_Interpretation(dim, attribute, input_labels) for attribute in (None, *attributes[:2])]
    return found


def _input_labels(op: OperatorCall, new: Sequence[int], dim: int) -> np.ndarray | None:
    """Return the labels of the running module's input that a new dimension can take its size from.

    Args:
        op: The call of view.
        new: Sizes of the new dimensions.
        dim: The new dimension.

    Returns:
        (positions, width) labels, with a row for each position of the new dimension. The width is 1 if the input has
        as many channels as the dimension has positions. If it has as many as this dimension and a neighboring one have
        together, the width is the size of the neighbor. None if neither number fits.
    """
    own = op.input_channels(new[dim])
    if own is not None:
        return own[:, None]
    if dim + 1 < len(new) and (both := op.input_channels(new[dim] * new[dim + 1])) is not None:
        return both.reshape(new[dim], -1)
    if dim and (both := op.input_channels(new[dim - 1] * new[dim])) is not None:
        return both.reshape(-1, new[dim]).T
    return None


VIEW_RULES: dict[str, Rule] = dict.fromkeys(["view", "_unsafe_view", "reshape", "_reshape_alias"], _view)

"""Rules of split and slice: where the sizes of the parts come from.

A network splits channels either into equal shares of what is there, or into sizes that its code gives as numbers. In
the second case, the numbers must follow from the channels that remain after pruning, so a module must hold them as
attributes. A rule lists the interpretations that are possible, and `OperatorCall.choose` picks one; the verification of
the trace finds out whether it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table
from gflow_pl.values import SizeAttribute

__all__ = ["SPLITTING_RULES"]

_UNKNOWN_SIZES = "a split with sizes that do not follow the channels"

Interpretation = Callable[[], None]
"""Adds the constraints of one interpretation of an operator."""


def _split(op: OperatorCall) -> None:
    """Label the outputs of an operator that splits a tensor.

    The operator is ``split(x, size, dim=0)``, ``split_with_sizes(x, sizes, dim=0)`` or ``chunk(x, chunks, dim=0)``.
    """
    x = op.operands[0]
    info = op.info(x)
    dim = op.arg(2, "dim", 0) % x.ndim
    vector = info.labels[dim]
    sizes = [part.shape[dim] for part in op.output]
    parts = None if vector is None else np.split(vector, np.cumsum(sizes)[:-1])
    if parts is not None and len(parts) > 1:
        _constrain_parts(op, parts)
    for i, output in enumerate(op.output):
        labels = list(info.labels)
        labels[dim] = None if parts is None else parts[i]
        op.set_labels(output, labels, info.zero_dims, info.is_uniform)


def _constrain_parts(op: OperatorCall, parts: Sequence[Labels]) -> None:
    """Choose where the sizes of the parts of a split come from, and add the constraints that follow.

    Args:
        op: The call of split.
        parts: The labels of every part.
    """
    sizes = [len(part) for part in parts]
    has_sizes = "with_sizes" in op.name
    is_equal = len(set(sizes)) == 1

    def join_parts() -> None:
        """Equal shares: the parts lose the same positions."""
        op.join_rows(np.stack(parts, axis=1))

    def count_parts(attributes: Sequence[SizeAttribute | None]) -> None:
        """Sizes from attributes: each part that has one shrinks on its own, all others stay."""
        for attribute, part in zip(attributes, parts, strict=False):
            if attribute is None:
                op.freeze(part, _UNKNOWN_SIZES)
            else:
                op.note_count(attribute, part)

    def count_shares(attribute: SizeAttribute, labels: Labels) -> None:
        """Equal shares whose size, or whose total, is an attribute."""
        join_parts()
        op.note_count(attribute, labels)

    # Everything that the sizes can mean, the most likely first.
    interpretations: list[Interpretation] = []
    if has_sizes:
        candidates: list[Sequence[SizeAttribute | None]] = [_list_attributes(op, sizes), *_single_attributes(op, sizes)]
        interpretations += [partial(count_parts, found) for found in candidates if found]
    if is_equal:
        interpretations.append(join_parts)
    if is_equal and not has_sizes:
        interpretations += [partial(count_shares, a, parts[0]) for a in op.size_attributes(sizes[0])]
        interpretations += [partial(count_shares, a, np.concatenate(parts)) for a in op.size_attributes(sum(sizes))]

    # Verification asks for the next one if a choice fails; the last choice freezes all parts.
    choice = op.choose(len(interpretations) + 1)
    if choice < len(interpretations):
        interpretations[choice]()
    else:
        for part in parts:
            op.freeze(part, _UNKNOWN_SIZES)


def _list_attributes(op: OperatorCall, sizes: Sequence[int]) -> list[SizeAttribute]:
    """Return the elements of an attribute of the running module that lists these sizes, none if there is none."""
    for name, value in op.sequence_attributes():
        if all(type(item) is int for item in value) and list(value) == sizes:
            return [SizeAttribute(op.module_name, name, i) for i in range(len(sizes))]
    return []


def _single_attributes(op: OperatorCall, sizes: Sequence[int]) -> list[list[SizeAttribute | None]]:
    """Return the ways in which single attributes of the running module can be the sizes of the parts.

    Returns:
        For each way, an attribute or None for every part. In the first way every part with an attribute of its size has
        one. If several attributes occur, further ways have one of them each.
    """
    found: list[SizeAttribute | None] = []
    for size in sizes:
        known = op.size_attributes(size)
        unused = [attribute for attribute in known if attribute not in found]
        found.append(next(iter(unused or known), None))
    attributes = list(dict.fromkeys(attribute for attribute in found if attribute is not None))
    single = [[attribute if attribute == one else None for attribute in found] for one in attributes]
    return [found, *(single if len(attributes) > 1 else [])] if attributes else []


def _slice(op: OperatorCall) -> None:
    """Label the output of ``slice(x, dim=0, start=None, end=None, step=1)``."""
    x = op.operands[0]
    info = op.info(x)
    dim = op.arg(1, "dim", 0) % x.ndim
    vector, size = info.labels[dim], x.shape[dim]
    labels = list(info.labels)
    if vector is not None and op.output.shape[dim] != size:
        start, stop, step = slice(op.arg(2, "start"), op.arg(3, "end"), op.arg(4, "step", 1)).indices(size)
        labels[dim] = vector[start:stop:step]
        _constrain_slice(op, vector, start, stop, step)
    op.set_labels(op.output, labels, info.zero_dims, info.is_uniform)


def _constrain_slice(op: OperatorCall, labels: Labels, start: int, stop: int, step: int) -> None:
    """Choose where the bounds of a slice come from, and add the constraints that follow.

    Args:
        op: The call of slice.
        labels: Labels of the whole dimension.
        start: First position of the slice.
        stop: Position after the last one.
        step: Distance between positions.
    """
    size, width = len(labels), stop - start
    interpretations: list[Interpretation] = []
    if step == 1 and width > 0 and size % width == 0 and start % width == 0:
        # One of several equal shares: all shares lose the same positions.
        interpretations.append(lambda: op.join_rows(labels.reshape(-1, width).T))
    if step == 1 and start == 0 and 0 < stop < size:
        interpretations += [partial(op.note_count, a, labels[:stop]) for a in op.size_attributes(stop)]
    if step == 1 and stop == size and 0 < start < size:
        interpretations += [partial(op.note_count, a, labels[:start]) for a in op.size_attributes(start)]

    choice = op.choose(len(interpretations) + 1)
    if choice == len(interpretations):
        op.freeze(labels, "a slice of the channels")
        return
    interpretations[choice]()
    if start:
        op.expect_argument(2, labels[:start])


_NAMES: dict[Rule, str] = {
    _split: "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk",
    _slice: "slice",
}
SPLITTING_RULES = rule_table(_NAMES)

"""Places where another reading of a view, split or slice may free channels that stay or collapse into one unit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gflow_pl.channels.grouping import Partition
from gflow_pl.channels.labels import ChoiceSite
from gflow_pl.channels.record import Record

__all__ = ["misread_sites", "num_removable", "open_sites"]

_MISREAD = ("a convolution slides along the channels", "a spatial dim")
"""First words of reasons that only hold if a view put the channels into that dimension."""


def num_removable(groups: Partition) -> int:
    """Return the number of filters in groups of which some units can go."""
    return sum(group.filters * group.original_size for group in groups.groups if group.original_size > 1)


def open_sites(record: Record, groups: Partition) -> list[tuple[ChoiceSite, int]]:
    """Return the sites at which channels arrive that cannot go, although another reading is left there.

    These are filters that stay, and groups of a single unit, which cannot lose it. Layers whose filters are the
    model's output are left out.

    Args:
        record: The record.
        groups: Its units and groups.

    Returns:
        Each site with the number of readings that are left, in the order of the forward.
    """
    is_stuck = np.zeros(len(groups.root), dtype=bool)  # by root
    for name in groups.frozen:
        facts = record.layers[name]
        if facts.outputs is not None and name not in groups.outputs and facts.votes:
            is_stuck[groups.root[facts.outputs]] = True
    for group, roots in zip(groups.groups, groups.unit_roots, strict=True):
        is_stuck[roots] = len(roots) == 1 and group.filters > 1
    return list(dict.fromkeys(_sites_of(record, is_stuck[groups.root])))


def misread_sites(record: Record, groups: Partition) -> list[tuple[ChoiceSite, int]]:
    """Return the open sites of layers that stay for a reason that only the present reading gives."""
    is_misread = np.zeros(len(groups.root), dtype=bool)  # by root
    for name, reason in groups.frozen.items():
        outputs = record.layers[name].outputs
        if outputs is not None and reason.startswith(_MISREAD):
            is_misread[groups.root[outputs]] = True
    return list(dict.fromkeys(_sites_of(record, is_misread[groups.root])))


def _sites_of(record: Record, is_wanted: np.ndarray) -> Iterator[tuple[ChoiceSite, int]]:
    """Yield the sites of operators that read or write wanted labels, with the number of readings that are left.

    Args:
        record: The record.
        is_wanted: (labels,) whether a label is wanted.
    """
    if not is_wanted.any():
        return
    for operators in record.operators.values():
        for operator in operators:
            if operator.site is not None and any(is_wanted[labels].any() for labels in operator.all_labels):
                yield operator.site, operator.choices_left

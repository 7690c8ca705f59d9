"""Units that stay whatever their score: layers named by the user, and the floor of every group."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

import numpy as np

from gflow_pl.selection.ranking import Ranking
from gflow_pl.selection.rounding import ceil_count
from gflow_pl.values import ChannelGroup

__all__ = ["floor_of", "match_groups", "protect_units"]


def floor_of(group: ChannelGroup, min_kept: float) -> int:
    """Fewest units that a group keeps: ceil(min_kept * original_size), at least one where units are removed.

    A group whose units are expanded (zeros stand in for them) may be emptied, with `min_kept` 0 only.
    """
    floor = ceil_count(min_kept * group.original_size)
    return max(floor, 1) if group.kind == "remove" else floor


def match_groups(groups: Iterable[ChannelGroup], layers: Collection[str], names: str | Iterable[str]) -> set[str]:
    """Names of the groups that hold a layer, or have a name, equal to or below one of `names`.

    Args:
        groups: The groups of the graph.
        layers: Names of all layers of the graph, in groups or not: naming a frozen layer is no mistake.
        names: Layers, groups, or what stands before a dot in their names ("layer1" names all below it).

    Raises:
        ValueError: A name matches nothing; the message gives the nearest names.
    """
    members = {group.name: {group.name, *(part.layer for part in group.layers)} for group in groups}
    known = set(layers).union(*members.values()) if members else set(layers)
    named: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        if not any(_is_below(candidate, name) for candidate in known):
            raise ValueError(
                f"`ignore` names '{name}', which is no layer, group or prefix of one.{_nearest(name, known)}"
            )
        named |= {group for group, inside in members.items() if any(_is_below(member, name) for member in inside)}
    return named


def protect_units(ranking: Ranking, ignored: Collection[str], min_kept: float) -> np.ndarray:
    """(units,) bool: the units that must stay.

    These are all units of ignored and of unscored groups, and in every other group the best ones, by score, up to its
    floor; among equals those that would go last.
    """
    protected = np.zeros(len(ranking.scores), dtype=bool)
    whole = {*ignored, *ranking.unscored}
    for number, group in enumerate(ranking.groups):
        units = ranking.units_of(number)
        if group.name in whole:
            protected[units] = True
            continue
        floor = min(floor_of(group, min_kept), group.size)
        ascending = np.argsort(ranking.scores[units], kind="stable")
        protected[units.start + ascending[group.size - floor :]] = True
    return protected


def _is_below(candidate: str, name: str) -> bool:
    return candidate == name or candidate.startswith(f"{name}.")


def _nearest(name: str, known: Collection[str]) -> str:
    prefixes = {
        ".".join(parts[:depth]) for parts in (k.split(".") for k in known) for depth in range(1, len(parts) + 1)
    }
    close = difflib.get_close_matches(name, sorted(prefixes), n=3, cutoff=0.4)
    if close:
        return f" Did you mean {' or '.join(repr(c) for c in close)}?"
    return f" Known: {', '.join(sorted(prefixes)[:12])}."

"""Units that stay whatever their score: layers named in `ignore`, and the floor of every group."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

import numpy as np

from gflow_pl.common.errors import SettingsError
from gflow_pl.selection.ranking import Ranking
from gflow_pl.selection.rounding import ceil_count
from gflow_pl.values import ChannelGroup

__all__ = ["group_floor", "match_groups", "protected_units"]


def group_floor(group: ChannelGroup, min_kept: float) -> int:
    """Return the smallest number of units that a group may be left with: ceil(min_kept * original_size).

    A group whose units are removed keeps at least one, because a layer without channels would cut the network in two.
    A group whose units are expanded may lose all of them if `min_kept` is 0, because zeros take their place.

    Args:
        group: The group.
        min_kept: Share of the group's original units, in [0, 1].
    """
    floor = ceil_count(min_kept * group.original_size)
    return max(floor, 1) if group.kind == "remove" else floor


def match_groups(groups: Iterable[ChannelGroup], layers: Collection[str], names: str | Iterable[str]) -> set[str]:
    """Return the names of the groups that `ignore` refers to.

    A name matches a group if the group, or a layer in it, has that name or a name that starts with it and a dot.

    Args:
        groups: Groups of the graph.
        layers: Names of all layers of the graph, in groups or not. Naming a frozen layer is no mistake.
        names: Layers, groups, or prefixes of their names up to a dot ("layer1" matches everything below it).

    Raises:
        SettingsError: A name matches nothing. The message lists the nearest names.
    """
    members = {group.name: {group.name, *(part.layer for part in group.layers)} for group in groups}
    known = set(layers).union(*members.values())
    matched: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        if not any(_is_at_or_below(candidate, name) for candidate in known):
            raise SettingsError(
                f"`ignore` names '{name}', which is no layer, group or prefix of one.{_suggestion(name, known)}"
            )
        matched |= {
            group for group, inside in members.items() if any(_is_at_or_below(member, name) for member in inside)
        }
    return matched


def protected_units(ranking: Ranking, ignored: Collection[str], min_kept: float) -> np.ndarray:
    """Return a mask of the units that must stay.

    All units of a group that is ignored or not scored must stay. In every other group, the units with the best scores
    must stay, as many as the floor of the group says; among equal scores, those that would be removed last.

    Args:
        ranking: The ranked units.
        ignored: Names of the groups of which no unit may be removed.
        min_kept: Share of its original units that every group keeps, in [0, 1].

    Returns:
        (units,) bool, in the order of `ranking.scores`.
    """
    protected = np.zeros(len(ranking.scores), dtype=bool)
    whole = {*ignored, *ranking.unscored}
    for number, group in enumerate(ranking.groups):
        units = ranking.units_of(number)
        if group.name in whole:
            protected[units] = True
            continue
        floor = min(group_floor(group, min_kept), group.size)
        ascending = np.argsort(ranking.scores[units], kind="stable")
        protected[units.start + ascending[group.size - floor :]] = True
    return protected


def _is_at_or_below(candidate: str, name: str) -> bool:
    """Return whether `candidate` is `name` or the name of something inside it ("layer1.0" is below "layer1")."""
    return candidate == name or candidate.startswith(f"{name}.")


def _suggestion(name: str, known: Collection[str]) -> str:
    """Return the end of the message for an unknown name: the nearest valid names, or the first ones if none is near."""
    split_names = (candidate.split(".") for candidate in known)
    prefixes = {".".join(parts[:depth]) for parts in split_names for depth in range(1, len(parts) + 1)}
    close = difflib.get_close_matches(name, sorted(prefixes), n=3, cutoff=0.4)
    if close:
        return f" Did you mean {' or '.join(repr(c) for c in close)}?"
    return f" Known: {', '.join(sorted(prefixes)[:12])}."

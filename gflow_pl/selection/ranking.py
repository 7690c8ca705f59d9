"""Scores of layers to one ranked list of all units of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from gflow_pl.values import ChannelGroup, Layer, Scores
from gflow_pl.values.choices import Scope, UnitScore

__all__ = ["Ranking", "rank_units"]

# How the scores of the channels, and then of the layers, that a unit holds become the score of the unit.
_REDUCTIONS: Mapping[str, Callable[..., Any]] = {"mean": np.mean, "sum": np.sum, "max": np.max}


@dataclass(frozen=True, eq=False)
class Ranking:
    """All units of a graph side by side, group after group, and the order in which they would go.

    Attributes:
        groups: The groups, in the order of the graph.
        starts: (groups + 1,) where each group's units begin; unit u of group g is entry ``starts[g] + u``.
        scores: (units,) score of each unit; 0 in groups that are not scored.
        filters: (units,) filters that each unit holds.
        order: (units,) entries in the order in which they would go, lowest first; ties stand in network order.
        unscored: Names of the groups none of whose voting layers is scored.
    """

    groups: tuple[ChannelGroup, ...]
    starts: np.ndarray
    scores: np.ndarray
    filters: np.ndarray
    order: np.ndarray
    unscored: tuple[str, ...]

    def units_of(self, group: int) -> slice:
        """Where the units of a group stand, by the group's number."""
        return slice(int(self.starts[group]), int(self.starts[group + 1]))


def rank_units(
    groups: Sequence[ChannelGroup],
    layers: Mapping[str, Layer],
    scores: Scores,
    *,
    unit_score: UnitScore = "mean",
    scope: Scope = "global",
) -> Ranking:
    """The units of all groups in the order in which they would go.

    A unit's score is the mean over the voting layers that are scored, of the mean over its channels in that layer.

    Args:
        groups: The groups whose units are ranked.
        layers: Facts of the layers, to check the lengths of the scores; layers it lacks are not checked.
        scores: Scores of layers; those that no group needs are ignored.
        unit_score: "mean", or the "sum" or "max" of all scores that the unit holds.
        scope: "global" ranks units by their scores; "layer" by their place in their own group's ranking, so that
            scores of different groups are never compared and all groups shrink at the same pace.

    Raises:
        ValueError: The scores of a layer do not fit the channels that it has now.
    """
    voters = [_voters(group) for group in groups]
    vectors = _to_numpy(scores, [name for group in voters for name in group])
    for name, vector in vectors.items():
        _check_length(name, len(vector), voters, layers)
    reduce = _REDUCTIONS[unit_score]
    starts = np.cumsum([0, *(group.size for group in groups)])
    values = np.zeros(starts[-1])
    unscored = []
    for number, (group, tables) in enumerate(zip(groups, voters, strict=True)):
        votes = [reduce(vectors[name][table], axis=1) for name, table in tables.items() if name in vectors]
        if votes and group.size:
            values[starts[number] : starts[number + 1]] = reduce(np.stack(votes), axis=0)
        elif not votes:
            unscored.append(group.name)
    keys = values if scope == "global" else _places(values, starts)
    return Ranking(
        groups=tuple(groups),
        starts=starts,
        scores=values,
        filters=np.repeat([group.filters for group in groups], np.diff(starts)).astype(np.int64),
        order=np.argsort(keys, kind="stable"),
        unscored=tuple(unscored),
    )


def _voters(group: ChannelGroup) -> dict[str, np.ndarray]:
    """Voting layer to the (units, width) table of its channels; a layer that stands twice in the group votes once."""
    tables: dict[str, np.ndarray] = {}
    for part in group.layers:
        if part.votes and part.index.shape[1]:
            seen = tables.get(part.layer)
            tables[part.layer] = part.index if seen is None else np.concatenate([seen, part.index], axis=1)
    return tables


def _to_numpy(scores: Scores, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The scores of the named layers that have some, in float64; one transfer, however many layers."""
    present = [name for name in dict.fromkeys(names) if name in scores]
    if not present:
        return {}
    device = scores[present[0]].device
    parts = [scores[name].detach().to(device) for name in present]
    # Half precision has no numpy twin and float64 does not exist on every device: widen only where it is needed.
    parts = [part if part.dtype == torch.float64 else part.float() for part in parts]
    together = torch.cat(parts).cpu().numpy().astype(np.float64)
    ends = np.cumsum([part.numel() for part in parts])
    return dict(zip(present, np.split(together, ends[:-1]), strict=True))


def _check_length(
    name: str, length: int, voters: Sequence[Mapping[str, np.ndarray]], layers: Mapping[str, Layer]
) -> None:
    if name in layers:
        fits, expected = length == layers[name].num_filters, str(layers[name].num_filters)
    else:
        least = max(int(tables[name].max(initial=-1)) for tables in voters if name in tables) + 1
        fits, expected = length >= least, f"at least {least}"
    if not fits:
        raise ValueError(
            f"Scores of layer '{name}' are for {length} filters, but it has {expected} now: "
            "score the network again after it was pruned."
        )


def _places(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """For each unit, the share of its group that is gone once it and all lower ones are."""
    places = np.empty_like(values)
    for begin, end in pairwise(starts):
        order = np.argsort(values[begin:end], kind="stable")
        places[begin + order] = np.arange(1, end - begin + 1) / max(end - begin, 1)
    return places

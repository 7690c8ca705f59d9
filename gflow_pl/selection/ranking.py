"""From the scores of layers to one ranked list of all units of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from gflow_pl.common.errors import SettingsError
from gflow_pl.values import ChannelGroup, Layer, Scores
from gflow_pl.values.choices import Scope, UnitScore

__all__ = ["Ranking", "rank_units"]

# Applied first over the channels that a unit has in a layer, then over the layers of the unit.
_REDUCTIONS: Mapping[UnitScore, Callable[..., np.ndarray]] = {"mean": np.mean, "sum": np.sum, "max": np.max}


@dataclass(frozen=True, eq=False)
class Ranking:
    """All units of a graph, concatenated group by group, and the order in which they are removed.

    Attributes:
        groups: The groups, in the order of the graph.
        starts: (groups + 1,) first entry of each group; unit u of group g is entry ``starts[g] + u``.
        scores: (units,) score of each unit; 0 in groups that are not scored.
        filters: (units,) number of filters in each unit.
        order: (units,) entries in the order of removal, lowest score first; ties in the order of the network.
        unscored: Names of the groups in which no voting layer is scored.
    """

    groups: tuple[ChannelGroup, ...]
    starts: np.ndarray
    scores: np.ndarray
    filters: np.ndarray
    order: np.ndarray
    unscored: tuple[str, ...]

    def units_of(self, group: int) -> slice:
        """Return the range of entries that belong to a group, given by its position in `groups`."""
        return slice(int(self.starts[group]), int(self.starts[group + 1]))


def rank_units(
    groups: Sequence[ChannelGroup],
    layers: Mapping[str, Layer],
    scores: Scores,
    *,
    unit_score: UnitScore = "mean",
    scope: Scope = "global",
) -> Ranking:
    """Rank the units of all groups from the first to be removed to the last.

    The score of a unit is the mean, over the voting layers that are scored, of the mean over its channels in that
    layer.

    Args:
        groups: The groups whose units are ranked.
        layers: Layers of the graph, to check the lengths of the scores. A layer that is missing is not checked.
        scores: Scores by layer, each (filters,). Layers that no group contains are ignored.
        unit_score: "mean", or "sum" or "max" to reduce the scores of a unit in that way instead.
        scope: "global" ranks units by their scores. "layer" ranks them by their relative position within their own
            group, so that scores of different groups are never compared and all groups shrink at the same pace.

    Raises:
        SettingsError: The scores of a layer do not fit the number of its channels.
    """
    # Scores of the voting layers, on the host.
    voters = [_channels_of_voters(group) for group in groups]
    vectors = _to_numpy(scores, [name for group in voters for name in group])
    for name, vector in vectors.items():
        _check_length(name, len(vector), voters, layers)
    # One score for each unit.
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
    # The order of removal.
    keys = values if scope == "global" else _relative_positions(values, starts)
    return Ranking(
        groups=tuple(groups),
        starts=starts,
        scores=values,
        filters=np.repeat([group.filters for group in groups], np.diff(starts)).astype(np.int64),
        order=np.argsort(keys, kind="stable"),
        unscored=tuple(unscored),
    )


def _channels_of_voters(group: ChannelGroup) -> dict[str, np.ndarray]:
    """Map each voting layer of a group to the (units, width) table of its channels.

    A layer may occur in a group several times. Its tables are then joined, so that it has one vote.
    """
    tables: dict[str, np.ndarray] = {}
    for part in group.layers:
        if part.votes and part.index.shape[1]:
            earlier = tables.get(part.layer)
            tables[part.layer] = part.index if earlier is None else np.concatenate([earlier, part.index], axis=1)
    return tables


def _to_numpy(scores: Scores, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the scores of those named layers that have some as float64, with a single transfer from the device."""
    present = [name for name in dict.fromkeys(names) if name in scores]
    if not present:
        return {}
    device = scores[present[0]].device
    parts = [scores[name].detach().to(device) for name in present]
    # numpy has no bfloat16, and some devices have no float64: convert to float32 there and widen on the host.
    parts = [part if part.dtype == torch.float64 else part.float() for part in parts]
    joined = torch.cat(parts).cpu().numpy().astype(np.float64)
    ends = np.cumsum([part.numel() for part in parts])
    return dict(zip(present, np.split(joined, ends[:-1]), strict=True))


def _check_length(
    name: str, length: int, voters: Sequence[Mapping[str, np.ndarray]], layers: Mapping[str, Layer]
) -> None:
    """Raise if a layer does not have one score for each of its filters. This happens if it is pruned after scoring.

    Args:
        name: Name of the layer.
        length: Number of its scores.
        voters: For every group, the result of `_channels_of_voters`.
        layers: Layers of the graph. For a layer that is missing here, the scores must reach its last channel in
            `voters`.

    Raises:
        SettingsError: The number of scores does not fit.
    """
    if name in layers:
        fits, expected = length == layers[name].num_filters, str(layers[name].num_filters)
    else:
        least = max(int(tables[name].max(initial=-1)) for tables in voters if name in tables) + 1
        fits, expected = length >= least, f"at least {least}"
    if not fits:
        raise SettingsError(
            f"Scores of layer '{name}' are for {length} filters, but it has {expected} now: "
            "score the network again after it was pruned."
        )


def _relative_positions(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return, for each unit, its rank within its group divided by the size of the group, in (0, 1]."""
    positions = np.empty_like(values)
    for begin, end in pairwise(starts):
        order = np.argsort(values[begin:end], kind="stable")
        positions[begin + order] = np.arange(1, end - begin + 1) / max(end - begin, 1)
    return positions

"""From scores to who stays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from gflow_pl.selection.costs import CostModel
from gflow_pl.selection.floors import match_groups, protect_units
from gflow_pl.selection.ranking import Ranking, rank_units
from gflow_pl.selection.rounding import floor_count
from gflow_pl.selection.schedule import percent_hint
from gflow_pl.values import ChannelGraph, KeepPlan, Scores
from gflow_pl.values.choices import Scope, Target, UnitScore, check_choice

__all__ = ["select_units"]


def select_units(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    fraction: float | None = None,
    *,
    min_kept: float = 0.05,
    ignore: str | Iterable[str] = (),
    num_filters: int | None = None,
    target: Target = "filters",
    scope: Scope = "global",
    unit_score: UnitScore = "mean",
) -> KeepPlan:
    """Decide which units stay.

    Units go in ascending order of score while the filters gone stay at or below floor(fraction * filters present). A
    protected unit is passed over and the next one goes. Equal scores go in the order of the network. Frozen layers,
    which stand in no group, are not counted.

    A unit weighs as many filters as it holds (a depthwise conv's included), so the count may end less than one unit
    below what was asked for. What cannot be met because too much is protected is a warning.

    Args:
        graph: The traced network; groups that were pruned before are counted as they are now.
        scores: Importance of every filter by layer, higher = keep; layers that the graph lacks are ignored. A group
            none of whose voting layers is scored is kept whole, with a warning.
        fraction: Share to remove, in [0, 1], of all filters present in the layers that stand in groups (protected
            ones included), or of what `target` names.
        min_kept: Share, in [0, 1], of its original units that every group keeps at least, rounded up: the best ones.
            At least one unit stays in a group whose units are removed; with 0, one whose units are expanded may be
            emptied.
        ignore: Layers and groups that stay whole, by name or by what stands before a dot in their names ("layer1").
        num_filters: Number of filters to remove, in place of `fraction`.
        target: What `fraction` is a share of: "filters", all "parameters" of the network, or its multiply-accumulates
            ("macs").
        scope: "global" compares the scores of all groups; "layer" only those within a group (all groups shrink at the
            same pace, and the fraction is met over all groups together).
        unit_score: How the scores of the layers that share a unit become one: "mean", "sum" or "max".

    Returns:
        A plan for every group of the graph; `asked` and `reached` are shares of what `target` names.

    Raises:
        ValueError: A number is out of its range, a name is unknown, or the scores of a layer do not fit it.
    """
    _check_arguments(fraction, num_filters, min_kept, target, scope, unit_score)
    if not isinstance(scores, Scores):
        scores = Scores(scores)
    ignored = match_groups(graph.groups, graph.layers, ignore)
    ranking = rank_units(graph.groups, graph.layers, scores, unit_score=unit_score, scope=scope)
    _say_unscored(ranking, ignored)
    protected = protect_units(ranking, ignored, min_kept)
    queue = ranking.order[~protected[ranking.order]]
    if target == "filters":
        total = int(ranking.filters.sum())
        wanted = floor_count(fraction * total) if fraction is not None else int(num_filters or 0)
        gone = np.concatenate([[0], np.cumsum(ranking.filters[queue])])
        num_gone = int(np.searchsorted(gone, wanted, side="right")) - 1
        removed = int(gone[num_gone])
    else:
        assert fraction is not None
        cost = _cost_function(graph, ranking, queue, target)
        total = cost(0)
        wanted = floor_count(fraction * total)
        num_gone = _last_within(lambda count: total - cost(count) <= wanted, len(queue))
        removed = total - cost(num_gone)
    if removed < wanted and num_gone == len(queue):
        _say_shortfall(wanted, removed, total, target, min_kept)
    keep = _keep_after(ranking, queue[:num_gone])
    asked = fraction if fraction is not None else (num_filters or 0) / max(total, 1)
    return KeepPlan(
        {name: torch.from_numpy(bits) for name, bits in keep.items()}, asked=asked, reached=removed / max(total, 1)
    )


def _keep_after(ranking: Ranking, gone: np.ndarray) -> dict[str, np.ndarray]:
    """Group name to who stays when these entries of the ranking go."""
    keep = np.ones(len(ranking.scores), dtype=bool)
    keep[gone] = False
    return {group.name: keep[ranking.units_of(number)].copy() for number, group in enumerate(ranking.groups)}


def _cost_function(graph: ChannelGraph, ranking: Ranking, queue: np.ndarray, target: Target) -> Callable[[int], int]:
    """The cost that is left once the first so many units of the queue are gone."""
    model = CostModel(graph)
    which = 0 if target == "parameters" else 1
    return lambda count: model.after(_keep_after(ranking, queue[:count]))[which]


def _last_within(holds: Callable[[int], bool], end: int) -> int:
    """The largest number in 0..end for which `holds`; it holds at 0 and, once it fails, fails for all that follow."""
    low, high = 0, end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _check_arguments(
    fraction: float | None, num_filters: int | None, min_kept: float, target: str, scope: str, unit_score: str
) -> None:
    if (fraction is None) == (num_filters is None):
        raise ValueError("select_units needs either `fraction` or `num_filters`, and not both.")
    for name, value in (("fraction", fraction), ("min_kept", min_kept)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {value!r}.{percent_hint(value)}")
    if num_filters is not None and num_filters < 0:
        raise ValueError(f"`num_filters` must be at least 0, got {num_filters}.")
    if num_filters is not None and target != "filters":
        raise ValueError(f"`num_filters` counts filters: with target='{target}' give a `fraction`.")
    check_choice("target", target, Target)
    check_choice("scope", scope, Scope)
    check_choice("unit_score", unit_score, UnitScore)


def _say_unscored(ranking: Ranking, ignored: Iterable[str]) -> None:
    names = [name for name in ranking.unscored if name not in set(ignored)]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"Kept whole, because none of their layers has scores: {', '.join(names[:5])}{more}.", stacklevel=3
        )


def _say_shortfall(wanted: int, removed: int, total: int, target: str, min_kept: float) -> None:
    warnings.warn(
        f"Asked to remove {wanted:,} of {total:,} {target}, only {removed:,} can go ({wanted - removed:,} fewer, "
        f"{removed / max(total, 1):.1%} instead of {wanted / max(total, 1):.1%}): the rest is protected by "
        f"min_kept={min_kept:g}, `ignore` or the lack of scores.",
        stacklevel=3,
    )

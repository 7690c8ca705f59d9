"""From scores to the units that stay."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from gflow_pl.common.checks import check_choice
from gflow_pl.common.errors import SettingsError
from gflow_pl.selection.costs import CostModel
from gflow_pl.selection.floors import match_groups, protected_units
from gflow_pl.selection.ranking import Ranking, rank_units
from gflow_pl.selection.rounding import floor_count
from gflow_pl.selection.schedule import percent_hint
from gflow_pl.values import ChannelGraph, KeepPlan, Scores
from gflow_pl.values.choices import Scope, Target, UnitScore

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
    """Choose the units that stay and the units that are removed.

    Units are removed in ascending order of score, as long as the number of filters removed does not exceed
    floor(fraction * filters present). Protected units are skipped. Units with equal scores are removed in the order of
    the network. Frozen layers belong to no group and are not counted.

    A unit counts as many filters as it contains, those of depthwise convolutions included. The number of filters
    removed may therefore be smaller than asked for, by less than one unit. If too many units are protected to reach it,
    a warning gives the difference.

    Args:
        graph: The traced network. After a rewrite, groups count with the units they have now.
        scores: Score of every filter by layer, higher = keep. Layers that are not in the graph are ignored. A group
            in which no voting layer is scored is kept whole, with a warning.
        fraction: Share to remove, in [0, 1], of the filters present in all groups, protected ones included, or of the
            quantity given by `target`.
        min_kept: Share of its original units, in [0, 1], that every group keeps at least, rounded up; the units with
            the best scores are kept. A group whose units are removed keeps at least one unit. With 0, a group whose
            units are expanded may lose all of them.
        ignore: Layers and groups that are kept whole: their names, or prefixes of names up to a dot ("layer1").
        num_filters: Number of filters to remove, instead of `fraction`.
        target: Quantity that `fraction` is a share of: "filters", all "parameters" of the network, or its
            multiply-accumulates ("macs").
        scope: "global" compares the scores of all groups. "layer" compares scores within a group only: all groups
            shrink at the same pace, and `fraction` is met over all groups together.
        unit_score: Reduction from the scores of a unit's filters to the score of the unit: "mean", "sum" or "max".

    Returns:
        A plan for every group of the graph. Its `asked` and `reached` are shares of the quantity given by `target`.

    Raises:
        SettingsError: A number is out of its range, a name is unknown, or the scores of a layer do not fit it.
    """
    _check_arguments(fraction, num_filters, min_kept, target, scope, unit_score)
    # Units that may be removed, lowest score first.
    if not isinstance(scores, Scores):
        scores = Scores(scores)
    ignored = match_groups(graph.groups, graph.layers, ignore)
    ranking = rank_units(graph.leaders, graph.layers, scores, unit_score=unit_score, scope=scope)
    _warn_of_unscored_groups(ranking, ignored)
    protected = protected_units(ranking, ignored, min_kept)
    queue = ranking.order[~protected[ranking.order]]
    # How many of them are removed.
    if target == "filters":
        total = int(ranking.filters.sum())
        wanted = floor_count(fraction * total) if fraction is not None else int(num_filters or 0)
        removed_after = np.concatenate([[0], np.cumsum(ranking.filters[queue])])
        num_removed = int(np.searchsorted(removed_after, wanted, side="right")) - 1
        removed = int(removed_after[num_removed])
    else:
        assert fraction is not None
        cost = _cost_function(graph, ranking, queue, target)
        total = cost(0)
        wanted = floor_count(fraction * total)
        num_removed = _last_that_holds(lambda count: total - cost(count) <= wanted, len(queue))
        removed = total - cost(num_removed)
    if removed < wanted and num_removed == len(queue):
        _warn_of_shortfall(wanted, removed, total, target, min_kept)
    # The plan.
    keep = _keep_after(ranking, queue[:num_removed])
    keep |= {group.name: keep[group.follows] for group in graph.groups if group.follows is not None}
    asked = fraction if fraction is not None else (num_filters or 0) / max(total, 1)
    return KeepPlan(
        {name: torch.from_numpy(bits) for name, bits in keep.items()}, asked=asked, reached=removed / max(total, 1)
    )


def _keep_after(ranking: Ranking, removed: np.ndarray) -> dict[str, np.ndarray]:
    """Return, by group, the mask of the units that stay when some entries of the ranking are removed."""
    keep = np.ones(len(ranking.scores), dtype=bool)
    keep[removed] = False
    return {group.name: keep[ranking.units_of(number)].copy() for number, group in enumerate(ranking.groups)}


def _cost_function(graph: ChannelGraph, ranking: Ranking, queue: np.ndarray, target: Target) -> Callable[[int], int]:
    """Return a function from a number n to the cost that remains when the first n units of the queue are removed."""
    model = CostModel(graph)
    which = 0 if target == "parameters" else 1
    return lambda count: model.after(_keep_after(ranking, queue[:count]))[which]


def _last_that_holds(holds: Callable[[int], bool], end: int) -> int:
    """Return the largest n in 0..end for which `holds(n)` is true, by bisection.

    `holds` must be true for 0 and monotone: once it is false, it is false for all larger numbers.
    """
    low, high = 0, end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _check_arguments(
    fraction: float | None, num_filters: int | None, min_kept: float, target: str, scope: str, unit_score: str
) -> None:
    """Raise if an argument of `select_units` is out of its range, or two of them exclude each other."""
    if (fraction is None) == (num_filters is None):
        raise SettingsError("select_units needs either `fraction` or `num_filters`, and not both.")
    for name, value in (("fraction", fraction), ("min_kept", min_kept)):
        if value is not None and not 0 <= value <= 1:
            raise SettingsError(f"`{name}` must be in [0, 1], got {value!r}.{percent_hint(value)}")
    if num_filters is not None and num_filters < 0:
        raise SettingsError(f"`num_filters` must be at least 0, got {num_filters}.")
    if num_filters is not None and target != "filters":
        raise SettingsError(f"`num_filters` counts filters: with target='{target}' give a `fraction`.")
    check_choice("target", target, Target)
    check_choice("scope", scope, Scope)
    check_choice("unit_score", unit_score, UnitScore)


def _warn_of_unscored_groups(ranking: Ranking, ignored: Iterable[str]) -> None:
    """Warn of groups that are kept whole because none of their voting layers is scored, unless they are ignored."""
    names = [name for name in ranking.unscored if name not in set(ignored)]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"Kept whole, because none of their layers is scored: {', '.join(names[:5])}{more}.", stacklevel=3
        )


def _warn_of_shortfall(wanted: int, removed: int, total: int, target: str, min_kept: float) -> None:
    """Warn that protected units kept the plan from removing as much as was asked for."""
    warnings.warn(
        f"Asked to remove {wanted:,} of {total:,} {target}, but only {removed:,} can be removed ({wanted - removed:,} "
        f"fewer, {removed / max(total, 1):.1%} instead of {wanted / max(total, 1):.1%}): the rest is protected by "
        f"min_kept={min_kept:g}, `ignore` or missing scores.",
        stacklevel=3,
    )

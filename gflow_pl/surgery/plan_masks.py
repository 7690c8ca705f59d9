"""A plan as masks over the positions of every tensor, and the tables of the graph after the plan is carried out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
from torch import Tensor

from gflow_pl.common.errors import SettingsError
from gflow_pl.values import ChannelGraph, ChannelGroup, Layer, LayerUnits, Slice

__all__ = ["PlanMasks", "masks_of_plan", "renumbered"]

Mask = np.ndarray
"""A bool vector, True = stays."""

IndexCache = dict[tuple[int, int], np.ndarray]
"""Results by the identities of two arrays: many slices of a group share one table, which is then processed once."""


@dataclass(frozen=True, eq=False)
class PlanMasks:
    """A plan as masks. Equal masks are mostly the same array, so they must not be written to.

    Attributes:
        units: Group name to (units,) bool, for every group of the graph.
        positions: (tensor, dim) to (size of that dim,) bool, for every dim that is cut.
        channels: Layer name to (filters,) bool, for every layer that loses filters.
    """

    units: dict[str, Mask]
    positions: dict[tuple[str, int], Mask]
    channels: dict[str, Mask]


def masks_of_plan(graph: ChannelGraph, plan: Mapping[str, Tensor], *, dead: Collection[str] = ()) -> PlanMasks:
    """Check a plan against the graph and translate it to masks over the positions of tensors and the filters of layers.

    Args:
        graph: The traced network.
        plan: Group name to a bool vector over its units. A group that is missing is kept whole.
        dead: Groups that lose all units, whatever the plan contains, because no layer reads them any longer.

    Raises:
        SettingsError: A group is unknown, a vector has the wrong size, or a group whose units are removed would be
            empty.
    """
    units = _checked_units(graph, plan)
    units.update({name: np.zeros_like(units[name]) for name in dead})
    positions: dict[tuple[str, int], Mask] = {}
    channels: dict[str, Mask] = {}
    for group in graph.groups:
        removed = np.flatnonzero(~units[group.name])
        if not len(removed):
            continue
        cache: IndexCache = {}
        for part in group.slices:
            key, size = (part.tensor, part.dim), graph.shapes[part.tensor][part.dim]
            mask = _mask_without(removed, part.index, size, cache)
            positions[key] = positions[key] & mask if key in positions else mask
        for layer in group.layers:
            mask = _mask_without(removed, layer.index, _num_filters(graph, layer), cache)
            channels[layer.layer] = channels[layer.layer] & mask if layer.layer in channels else mask
    return PlanMasks(units, positions, channels)


def _mask_without(removed: np.ndarray, index: np.ndarray, size: int, cache: IndexCache) -> Mask:
    """Return the mask of the positions that stay when some units are removed.

    Args:
        removed: (removed units,) numbers of the units.
        index: (units, width) positions that each unit holds.
        size: Number of positions.
        cache: Masks of this group by identity of `index`, and `size`.
    """
    key = (id(index), size)
    if key not in cache:
        cache[key] = np.ones(size, dtype=bool)
        cache[key][index.take(removed, axis=0)] = False
    return cache[key]


def _num_filters(graph: ChannelGraph, part: LayerUnits) -> int:
    """Return the number of filters of a layer, or, if the graph does not list it, the number its group implies."""
    layer = graph.layers.get(part.layer)
    return layer.num_filters if layer is not None else int(part.index.max(initial=-1)) + 1


def _checked_units(graph: ChannelGraph, plan: Mapping[str, Tensor]) -> dict[str, Mask]:
    """Return the plan as numpy masks, for every group; raise if it does not fit the graph."""
    # Names.
    sizes = {group.name: group.size for group in graph.groups}
    unknown = [name for name in plan if name not in sizes]
    if unknown:
        raise SettingsError(
            f"The plan names groups that the graph does not have: {unknown}. Known: {', '.join(sizes)}."
        )
    # Sizes.
    units: dict[str, Mask] = {}
    for group in graph.groups:
        if group.name not in plan:  # kept whole
            units[group.name] = np.ones(group.size, dtype=bool)
            continue
        bits = np.asarray(plan[group.name])
        if bits.dtype != bool or bits.shape != (group.size,):
            raise SettingsError(
                f"The plan of group '{group.name}' must be {group.size} bools, one for each unit now present, "
                f"got shape {bits.shape} of {bits.dtype}."
            )
        if group.size and group.kind == "remove" and not bits.any():
            raise SettingsError(
                f"The plan leaves 0 of {group.size} units in group '{group.name}', which would cut the network in two: "
                "keep at least one; only groups of kind 'expand' may be emptied."
            )
        units[group.name] = bits
    return _with_followers(graph, plan, units)


def _with_followers(graph: ChannelGraph, plan: Mapping[str, Tensor], units: dict[str, Mask]) -> dict[str, Mask]:
    """Return the plan with the units of the groups that follow another one; raise if it contradicts."""
    for group in graph.groups:
        if group.follows is None:
            continue
        if group.name in plan and not np.array_equal(units[group.name], units[group.follows]):
            raise SettingsError(
                f"The plan keeps other units of group '{group.name}' than of '{group.follows}', which it copies: leave "
                f"'{group.name}' out of the plan."
            )
        units[group.name] = units[group.follows]
    return units


def renumbered(
    graph: ChannelGraph, masks: PlanMasks
) -> tuple[list[ChannelGroup], dict[str, tuple[int, ...]], dict[str, Layer]]:
    """Return groups, shapes and layers of the graph after the cut, with all positions counted anew.

    Args:
        graph: The graph before the cut; it is not changed.
        masks: The plan.

    Raises:
        SettingsError: A unit that stays holds a position that is removed with another group: the graph is inconsistent.
    """
    cache: dict[int, np.ndarray] = {}
    new_positions = {key: _new_positions(mask, cache) for key, mask in masks.positions.items()}
    new_channels = {name: _new_positions(mask, cache) for name, mask in masks.channels.items()}
    groups = [_renumbered_group(group, masks.units[group.name], new_positions, new_channels) for group in graph.groups]
    shapes = {name: list(shape) for name, shape in graph.shapes.items()}
    for (tensor, dim), mask in masks.positions.items():
        shapes[tensor][dim] = int(np.count_nonzero(mask))
    layers = dict(graph.layers)
    for name in layers.keys() & masks.channels.keys():
        layers[name] = replace(layers[name], num_filters=int(np.count_nonzero(masks.channels[name])))
    return groups, {name: tuple(shape) for name, shape in shapes.items()}, layers


def _renumbered_group(
    group: ChannelGroup,
    stays: Mask,
    new_positions: Mapping[tuple[str, int], np.ndarray],
    new_channels: Mapping[str, np.ndarray],
) -> ChannelGroup:
    """Return a group after the cut.

    Args:
        group: The group.
        stays: (units,) bool.
        new_positions: (tensor, dim) to the new position of every old one, -1 where it is removed.
        new_channels: Layer name to the new number of every filter, -1 where it is removed.
    """
    units = np.flatnonzero(stays)
    slices, layers = [], []
    cache: IndexCache = {}
    try:
        for part in group.slices:
            index = _renumbered_index(part.index, units, new_positions.get((part.tensor, part.dim)), cache)
            slices.append(Slice(part.tensor, part.dim, index))
        for layer in group.layers:
            index = _renumbered_index(layer.index, units, new_channels.get(layer.layer), cache)
            layers.append(LayerUnits(layer.layer, index, layer.votes))
    except ValueError as error:  # Slice and LayerUnits accept no negative position
        raise SettingsError(
            f"Units of group '{group.name}' that stay hold positions that another group removes: "
            "the graph is inconsistent, trace the network again."
        ) from error
    kept = tuple(compress(group.kept, stays.tolist()))
    return group.with_parts(kept=kept, slices=tuple(slices), layers=tuple(layers))


def _new_positions(kept: Mask, cache: dict[int, np.ndarray]) -> np.ndarray:
    """Return the new position of every old one, -1 where it is removed.

    Args:
        kept: (positions,) bool.
        cache: Results by identity of the mask.
    """
    if id(kept) not in cache:
        cache[id(kept)] = np.where(kept, kept.cumsum() - 1, -1)
    return cache[id(kept)]


def _renumbered_index(
    index: np.ndarray, units: np.ndarray, new_positions: np.ndarray | None, cache: IndexCache
) -> np.ndarray:
    """Return a table of positions after the cut. Tables that were shared stay shared.

    Args:
        index: (units, width) positions before the cut.
        units: Numbers of the units that stay.
        new_positions: New position of every old one, -1 where it is removed; None if all positions stay.
        cache: Results by the identities of `index` and `new_positions`.
    """
    key = (id(index), id(new_positions))
    if key not in cache:
        rows = index.take(units, axis=0)
        cache[key] = rows if new_positions is None else new_positions[rows]
        cache[key].setflags(write=False)
    return cache[key]

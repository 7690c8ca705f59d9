"""What a plan says of every position of every tensor, and how the graph's tables are numbered after it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
from torch import Tensor

from gflow_pl.values import ChannelGraph, ChannelGroup, Layer, LayerUnits, Slice

__all__ = ["Decision", "decide", "renumbered"]

Mask = np.ndarray


@dataclass(frozen=True, eq=False)
class Decision:
    """A plan, spelt out; equal masks are mostly one and the same, and nobody writes into them.

    Attributes:
        units: Group name to (units,) bool, for every group.
        positions: (tensor, dim) to (size of that dim,) bool, where a group cuts it.
        channels: Layer name to (filters,) bool, where a group cuts it.
    """

    units: dict[str, Mask]
    positions: dict[tuple[str, int], Mask]
    channels: dict[str, Mask]


def decide(graph: ChannelGraph, plan: Mapping[str, Tensor], *, dead: Collection[str] = ()) -> Decision:
    """Checks a plan against the graph and spells it out.

    Args:
        graph: The traced network.
        plan: Group name to a bool vector over its units; groups it lacks are kept whole.
        dead: Groups of which nothing stays, whatever the plan says, because nobody reads them any more.

    Raises:
        ValueError: A group is unknown, a vector has the wrong size, or a removed group would be empty.
    """
    units = _checked_units(graph, plan)
    units.update({name: np.zeros_like(units[name]) for name in dead})
    positions: dict[tuple[str, int], Mask] = {}
    channels: dict[str, Mask] = {}
    for group in graph.groups:
        gone = np.flatnonzero(~units[group.name])
        if not len(gone):
            continue
        known: dict[tuple[int, int], Mask] = {}
        for part in group.slices:
            key, size = (part.tensor, part.dim), graph.shapes[part.tensor][part.dim]
            mask = _without(gone, part.index, size, known)
            positions[key] = positions[key] & mask if key in positions else mask
        for layer in group.layers:
            mask = _without(gone, layer.index, _num_channels(graph, layer), known)
            channels[layer.layer] = channels[layer.layer] & mask if layer.layer in channels else mask
    return Decision(units, positions, channels)


def _without(gone: np.ndarray, index: np.ndarray, size: int, known: dict[tuple[int, int], Mask]) -> Mask:
    """Which of `size` positions stay when some units go; one mask for all slices that share their table."""
    key = (id(index), size)
    if key not in known:
        known[key] = np.ones(size, dtype=bool)
        known[key][index.take(gone, axis=0)] = False
    return known[key]


def _num_channels(graph: ChannelGraph, part: LayerUnits) -> int:
    layer = graph.layers.get(part.layer)
    return layer.num_filters if layer is not None else int(part.index.max(initial=-1)) + 1


def _checked_units(graph: ChannelGraph, plan: Mapping[str, Tensor]) -> dict[str, Mask]:
    sizes = {group.name: group.size for group in graph.groups}
    unknown = [name for name in plan if name not in sizes]
    if unknown:
        raise ValueError(
            f"The plan speaks of groups that the graph does not have: {unknown}. Known: {', '.join(sizes)}."
        )
    units: dict[str, Mask] = {}
    for group in graph.groups:
        if group.name not in plan:
            units[group.name] = np.ones(group.size, dtype=bool)
            continue
        bits = np.asarray(plan[group.name])
        if bits.dtype != bool or bits.shape != (group.size,):
            raise ValueError(
                f"The plan of group '{group.name}' must be {group.size} bools, one for each unit now present, "
                f"got shape {bits.shape} of {bits.dtype}."
            )
        if group.size and group.kind == "remove" and not bits.any():
            raise ValueError(
                f"The plan leaves 0 of {group.size} units in group '{group.name}', which would cut the network in two: "
                "keep at least one; only groups of kind 'expand' may be emptied."
            )
        units[group.name] = bits
    return units


def renumbered(
    graph: ChannelGraph, decision: Decision
) -> tuple[list[ChannelGroup], dict[str, tuple[int, ...]], dict[str, Layer]]:
    """Groups, shapes and layers of the graph as they are after the cut.

    Raises:
        ValueError: A unit that stays holds a position that goes with another group: the graph contradicts itself.
    """
    known: dict[int, np.ndarray] = {}
    new_place = {key: _new_places(mask, known) for key, mask in decision.positions.items()}
    new_channel = {name: _new_places(mask, known) for name, mask in decision.channels.items()}
    groups = []
    for group in graph.groups:
        stay = np.flatnonzero(decision.units[group.name])
        slices, layers = [], []
        moved: dict[tuple[int, int], np.ndarray] = {}
        try:
            for part in group.slices:
                index = _moved(part.index, stay, new_place.get((part.tensor, part.dim)), moved)
                slices.append(Slice(part.tensor, part.dim, index))
            for layer in group.layers:
                index = _moved(layer.index, stay, new_channel.get(layer.layer), moved)
                layers.append(LayerUnits(layer.layer, index, layer.votes))
        except ValueError as error:
            raise ValueError(
                f"Units of group '{group.name}' that stay hold positions that another group takes away: "
                "the graph contradicts itself, trace the network again."
            ) from error
        kept = tuple(compress(group.kept, decision.units[group.name].tolist()))
        groups.append(group.with_parts(kept=kept, slices=tuple(slices), layers=tuple(layers)))
    shapes = {name: list(shape) for name, shape in graph.shapes.items()}
    for (tensor, dim), mask in decision.positions.items():
        shapes[tensor][dim] = int(np.count_nonzero(mask))
    layers_now = {
        name: replace(layer, num_filters=int(np.count_nonzero(decision.channels[name])))
        if name in decision.channels
        else layer
        for name, layer in graph.layers.items()
    }
    return groups, {name: tuple(shape) for name, shape in shapes.items()}, layers_now


def _new_places(kept: Mask, known: dict[int, np.ndarray]) -> np.ndarray:
    """Old position to new position, -1 where it is gone; found once for every mask."""
    if id(kept) not in known:
        known[id(kept)] = np.where(kept, kept.cumsum() - 1, -1)
    return known[id(kept)]


def _moved(
    index: np.ndarray, stay: np.ndarray, new_places: np.ndarray | None, known: dict[tuple[int, int], np.ndarray]
) -> np.ndarray:
    """A table of positions as it is after the cut, shared as before; -1 where a position went although its unit stays."""
    key = (id(index), id(new_places))
    if key not in known:
        rows = index.take(stay, axis=0)
        known[key] = rows if new_places is None else new_places[rows]
        known[key].setflags(write=False)
    return known[key]

"""From what a survey wrote down to units and groups of units."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gflow_pl.channels.constraints import Nodes
from gflow_pl.channels.expansions import Cuts, connected
from gflow_pl.channels.record import LayerFacts, Survey
from gflow_pl.values import ChannelGroup, Expansion, LayerUnits, Slice
from gflow_pl.values.expansion_names import is_index_buffer

__all__ = ["Partition", "partition"]

_NO_VOTE = "no conv or linear layer produces these channels alone"


@dataclass(eq=False)
class Partition:
    """Units, groups, and why the rest is frozen.

    Attributes:
        root: Per node, the smallest node of its unit.
        groups: In the order of the network.
        unit_roots: Per group, the root of every unit.
        frozen: Layer to the reason why (some of) its filters stay.
        patches: Module to attribute to what counts it, see `ChannelGraph.patches`.
        outputs: Layers whose channels are among the model's outputs.
    """

    root: Nodes
    groups: list[ChannelGroup]
    unit_roots: list[Nodes]
    frozen: dict[str, str]
    patches: dict[str, dict[str, dict[str, object]]]
    outputs: set[str]


class _Roots:
    """What is known of every unit, in arrays over the nodes that are indexed by a unit's root."""

    def __init__(self, found: Survey, cuts: Cuts, exact_only: bool, more_soft: list[tuple[Nodes, str]]) -> None:
        book = found.book
        self.root = root = connected(book, cuts.modules)
        frozen = [(np.zeros(1, np.int64), "padded with constants"), *book.frozen]
        frozen += [(b.outer, cuts.modules[b.module]) for b in book.boundaries if b.module in cuts.modules]
        soft = [*book.soft, *more_soft]
        if exact_only:
            frozen += [(nodes, f"{why} (exact_only)") for nodes, why in soft]
        self.why_frozen, self.frozen_reasons = self._first(frozen)
        self.why_soft, self.soft_reasons = self._first(soft)
        self.votes = np.zeros(book.num_nodes, dtype=bool)
        self.expanded = np.full(book.num_nodes, -1)
        for number, facts in enumerate(found.layers.values()):
            if facts.outputs is not None and _votes(facts, cuts):
                self.votes[root[facts.outputs]] = True
                if facts.name in cuts.layers:
                    self.expanded[root[facts.outputs]] = number

    def _first(self, events: list[tuple[Nodes, str]]) -> tuple[Nodes, list[str]]:
        """Per root, the number of the first reason given for any of its nodes, -1 for none; and the reasons."""
        reasons = list(dict.fromkeys(why for _, why in events))
        number = {why: i for i, why in enumerate(reasons)}
        first = np.full(len(self.root), -1)
        if events:
            nodes = np.concatenate([nodes for nodes, _ in events])
            numbers = np.repeat([number[why] for _, why in events], [len(nodes) for nodes, _ in events])
            first[self.root[nodes[::-1]]] = numbers[::-1]  # of several, the last one written stays: the first event
        return first, reasons


def partition(
    found: Survey, cuts: Cuts, *, exact_only: bool = False, more_soft: list[tuple[Nodes, str]] | None = None
) -> Partition:
    """Sorts connected nodes into units, and like units into groups.

    Args:
        found: The survey.
        cuts: The layers to expand.
        exact_only: Whether units that do not keep the output are frozen.
        more_soft: Further nodes that may go but not without changing the rest, with the reason.
    """
    book = found.book
    roots = _Roots(found, cuts, exact_only, more_soft or [])
    root = roots.root
    table_of = np.repeat(np.arange(len(book.tables)), np.diff(book.starts))
    real = np.array([not name.startswith("@") or name.startswith("@attribute") for name, _ in book.tables])
    _no_strangers(found, cuts, roots, table_of, real)
    nodes = np.flatnonzero(real[table_of] & (roots.why_frozen[root] < 0) & roots.votes[root])
    groups = _Grouping(found, cuts, roots, nodes, table_of).groups()
    layers = list(found.layers.values())
    output = np.zeros(book.num_nodes, dtype=bool)
    for vector in found.outputs:
        output[root[vector]] = True
    frozen = _frozen_layers(layers, roots, groups)
    outputs = {f.name for f in layers if f.outputs is not None and output[root[f.outputs]].any()}
    patches = _patches(found, groups)
    return Partition(root, [group for group, _ in groups], [rows for _, rows in groups], frozen, patches, outputs)


def _no_strangers(found: Survey, cuts: Cuts, roots: _Roots, table_of: Nodes, real: Nodes) -> None:
    """A filter that is expanded is its layer's (and the norm's behind it) alone."""
    if not cuts.layers:
        return
    book, root = found.book, roots.root
    layers = list(found.layers.values())
    owner = roots.expanded[root]
    candidates = np.flatnonzero((owner >= 0) & real[table_of])
    pairs = owner[candidates] * len(book.tables) + table_of[candidates]
    for pair in np.unique(pairs).tolist():
        facts, name = layers[pair // len(book.tables)], book.tables[pair % len(book.tables)][0]
        own = (f"{facts.name}.", f"{cuts.layers[facts.name]}.", f"@attribute:{facts.name}:")
        if name != facts.weight and not name.startswith(own):
            roots.why_frozen[root[candidates[pairs == pair]]] = _reason(roots, "its weight is used elsewhere too")


def _reason(roots: _Roots, why: str) -> int:
    if why not in roots.frozen_reasons:
        roots.frozen_reasons.append(why)
    return roots.frozen_reasons.index(why)


class _Places:
    """The group of every unit, and its row there.

    Args:
        members: Per group, its units in order.
        num_units: Of all groups.
    """

    def __init__(self, members: list[Nodes], num_units: int) -> None:
        self.sizes = [len(units) for units in members]
        units = np.concatenate(members)
        self.group, self.row = np.empty(num_units, dtype=np.int64), np.empty(num_units, dtype=np.int64)
        self.group[units] = np.repeat(np.arange(len(members)), self.sizes)
        self.row[units] = np.concatenate([np.arange(size) for size in self.sizes])


class _Grouping:
    """Units with the same number of positions in the same tensors form a group."""

    def __init__(self, found: Survey, cuts: Cuts, roots: _Roots, nodes: Nodes, table_of: Nodes) -> None:
        self.found, self.cuts, self.roots = found, cuts, roots
        self.layers = list(found.layers.values())
        units = roots.root[nodes]
        order = np.argsort(units, kind="stable")  # within a unit by table and position, as nodes are numbered
        self.nodes, self.units, self.tables = nodes[order], units[order], table_of[nodes][order]

    def groups(self) -> list[tuple[ChannelGroup, Nodes]]:
        """Groups in the order of the network, each with the roots of its units."""
        if not len(self.nodes):
            return []
        new = np.diff(self.units, prepend=-1) != 0
        roots, unit_of = self.units[new], np.cumsum(new) - 1
        first_layer, first_channel = self._first_channels(roots)
        _, group_of = np.unique(self._signatures(roots, unit_of, first_layer), return_inverse=True)
        order = np.lexsort((first_channel, group_of))
        members = np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1)
        members.sort(key=lambda units: (int(first_layer[units[0]]), int(first_channel[units[0]])))
        place = _Places(members, len(roots))
        self.known_tables: dict[tuple[tuple[int, ...], bytes], np.ndarray] = {}
        slices = self._slices(place, unit_of)
        layers = self._layers(place, roots)
        taken: dict[str, int] = {}
        made = []
        for number, units in enumerate(members):
            base = self.layers[int(first_layer[units[0]])].name
            taken[base] = taken.get(base, -1) + 1
            name = base if not taken[base] else f"{base}:{taken[base]}"
            made.append((self._group(name, roots[units], layers[number], slices[number]), roots[units]))
        return made

    def _signatures(self, roots: Nodes, unit_of: Nodes, first_layer: Nodes) -> Nodes:
        """A number per unit that is the same where the units hold as many positions of the same tensors."""
        num_tables = len(self.found.book.tables)
        pairs = unit_of * num_tables + self.tables
        bounds = np.flatnonzero(np.diff(pairs, prepend=-1))
        pair, counts = pairs[bounds], np.diff(bounds, append=len(pairs))
        facts = (pair % num_tables) * 1_000_003 + counts
        signature = np.zeros(len(roots), dtype=np.uint64)
        np.add.at(signature, pair // num_tables, _mixed(facts))
        soft = self.roots.why_soft[roots] + 1
        return (
            signature
            + _mixed(soft + 7)
            + _mixed(self.roots.expanded[roots] + 1_000_000_007)
            + _mixed(first_layer + 3_000_000_019)
        )

    def _first_channels(self, roots: Nodes) -> tuple[Nodes, Nodes]:
        """Per unit, its first voting layer and its lowest channel there."""
        layer = np.full(self.found.book.num_nodes, len(self.layers))
        channel = np.zeros(self.found.book.num_nodes, dtype=np.int64)
        for number in range(len(self.layers) - 1, -1, -1):
            facts = self.layers[number]
            if _votes(facts, self.cuts) and facts.outputs is not None:
                backwards = facts.outputs[::-1]
                layer[self.roots.root[backwards]] = number
                channel[self.roots.root[backwards]] = np.arange(len(backwards))[::-1]
        return layer[roots], channel[roots]

    def _slices(self, place: _Places, unit_of: Nodes) -> list[list[Slice]]:
        """Per group, the part of every tensor that goes with it: a row of positions for every unit."""
        starts = np.array(self.found.book.starts)
        part = place.group[unit_of] * len(self.found.book.tables) + self.tables
        order = np.argsort(part * (max(place.sizes) + 1) + place.row[unit_of], kind="stable")
        number, tables = place.group[unit_of[order]], self.tables[order]
        positions = self.nodes[order] - starts[tables]
        bounds = np.flatnonzero(np.diff(part[order], prepend=-1, append=-1)).tolist()
        slices: list[list[Slice]] = [[] for _ in place.sizes]
        for first, last in pairwise(bounds):
            group = int(number[first])
            tensor, dim = self.found.book.tables[int(tables[first])]
            index = self._shared(positions[first:last].reshape(place.sizes[group], -1))
            slices[group].append(Slice(tensor, dim, index))
        return slices

    def _shared(self, index: np.ndarray) -> np.ndarray:
        """One read-only table for all that are equal: most of a group's are, and surgery then moves them once."""
        key = (index.shape, index.tobytes())
        if key not in self.known_tables:
            table = self.known_tables[key] = np.array(index, dtype=np.int64)
            table.setflags(write=False)
        return self.known_tables[key]

    def _layers(self, place: _Places, roots: Nodes) -> list[list[LayerUnits]]:
        """Per group, the filters of every layer that go with it; those that vote first."""
        unit_of = np.full(self.found.book.num_nodes, -1)
        unit_of[roots] = np.arange(len(roots))
        parts: list[list[LayerUnits]] = [[] for _ in place.sizes]
        for facts in self.layers:
            if facts.outputs is None:
                continue
            unit = unit_of[self.roots.root[facts.outputs]]
            channels = np.flatnonzero(unit >= 0)
            number, row = place.group[unit[channels]], place.row[unit[channels]]
            order = np.lexsort((channels, row, number))
            bounds = np.flatnonzero(np.diff(number[order])) + 1
            for part in np.split(order, bounds) if len(order) else []:
                group = int(number[part[0]])
                index = self._shared(channels[part].reshape(place.sizes[group], -1))
                parts[group].append(LayerUnits(facts.name, index, _votes(facts, self.cuts)))
        return [sorted(part, key=lambda layer: not layer.votes) for part in parts]

    def _group(self, name: str, unit_roots: Nodes, layers: list[LayerUnits], slices: list[Slice]) -> ChannelGroup:
        expanded = int(self.roots.expanded[unit_roots[0]])
        soft = int(self.roots.why_soft[unit_roots[0]])
        return ChannelGroup(
            name=name,
            kind="remove" if expanded < 0 else "expand",
            original_size=len(unit_roots),
            kept=tuple(range(len(unit_roots))),
            filters=sum(part.index.shape[1] for part in layers),
            layers=tuple(layers),
            slices=tuple(part for part in slices if not is_index_buffer(part.tensor)),
            expansion=None if expanded < 0 else self._expansion(self.layers[expanded]),
            inexact=None if soft < 0 else self.roots.soft_reasons[soft],
        )

    def _expansion(self, facts: LayerFacts) -> Expansion:
        module = self.cuts.layers[facts.name]
        gathers = self.cuts.gathers(facts.name)
        known = self.found.expanded.get(module)
        if known is not None:
            return Expansion(module, *known, gathers=gathers)
        dim = next((b.dim for b in self.found.book.boundaries if b.module == module), -1)
        return Expansion(module, dim, facts.num_filters, gathers)


def _votes(facts: LayerFacts, cuts: Cuts) -> bool:
    """A depthwise convolution follows what it reads, unless it is cut off from it."""
    return facts.votes or cuts.gathers(facts.name)


def _mixed(numbers: Nodes) -> Nodes:
    """Well-spread 64-bit numbers (splitmix64), so that sums of different sets differ."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _frozen_layers(layers: list[LayerFacts], roots: _Roots, groups: list[tuple[ChannelGroup, Nodes]]) -> dict[str, str]:
    grouped = np.zeros(len(roots.root), dtype=bool)
    for _, unit_roots in groups:
        grouped[unit_roots] = True
    frozen = {}
    for facts in layers:
        if facts.outputs is None:
            frozen[facts.name] = "its filters cannot be told apart in what it puts out"
            continue
        own = roots.root[facts.outputs]
        stay = own[~grouped[own]]
        if len(stay):
            why = roots.why_frozen[stay]
            why = why[why >= 0]
            frozen[facts.name] = roots.frozen_reasons[int(why[0])] if len(why) else _NO_VOTE
    return frozen


def _patches(found: Survey, groups: list[tuple[ChannelGroup, Nodes]]) -> dict[str, dict[str, dict[str, object]]]:
    """Attributes that count channels; their slices leave the groups."""
    sizes = {
        name: stop - start
        for (name, _), start, stop in zip(found.book.tables, found.book.starts, found.book.starts[1:], strict=False)
        if name.startswith("@attribute")
    }
    patches: dict[str, dict[str, dict[str, object]]] = {}
    for i, (group, unit_roots) in enumerate(groups):
        tensors = tuple(part for part in group.slices if not part.tensor.startswith("@"))
        for part in group.slices:
            if part.tensor.startswith("@"):
                _, module, attribute = part.tensor.split(":")
                entry = patches.setdefault(module, {}).setdefault(
                    attribute, {"base": sizes[part.tensor], "per_unit": {}}
                )
                entry["base"] -= part.index.size  # type: ignore[operator]
                entry["per_unit"][group.name] = part.index.shape[1]  # type: ignore[index]
        if len(tensors) < len(group.slices):
            groups[i] = (group.with_parts(slices=tensors), unit_roots)
    for name, size in sizes.items():
        _, module, attribute = name.split(":")
        listed = attribute.partition("[")[0] + "["
        if any(other.startswith(listed) for other in patches.get(module, {})):
            patches[module].setdefault(attribute, {"base": size, "per_unit": {}})
    return patches

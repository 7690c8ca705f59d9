"""From constraints to units, and from units to groups of units that are pruned alike."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gflow_pl.channels.constraints import Auxiliary, BoundaryKey, Labels, TensorDim
from gflow_pl.channels.expansions import Expansions
from gflow_pl.channels.record import LayerFacts, Record
from gflow_pl.channels.unit_facts import Reasons, UnitFacts, freeze_shared_expansions, votes
from gflow_pl.values import ChannelGroup, Expansion, LayerUnits, SizeAttribute, SizeRule, Slice
from gflow_pl.values.expansion_names import is_index_buffer

__all__ = ["Partition", "partition"]

_NO_VOTE = "no conv or linear layer produces these channels alone"


@dataclass(eq=False)
class Partition:
    """The units and groups of a network, and why the other channels are frozen.

    Attributes:
        root: (labels,) the smallest label of the unit that a label belongs to.
        groups: The groups in the order of the network.
        unit_roots: For every group, the (units,) roots of its units.
        frozen: Layer to the reason why (some of) its filters stay.
        patches: Whole numbers of modules that follow from the groups, see `ChannelGraph.patches`.
        outputs: Layers whose channels are among the model's outputs.
    """

    root: Labels
    groups: list[ChannelGroup]
    unit_roots: list[Labels]
    frozen: dict[str, str]
    patches: dict[SizeAttribute, SizeRule]
    outputs: set[str]


def partition(record: Record, expansions: Expansions, *, exact_only: bool = False, inexact: Reasons = ()) -> Partition:
    """Collect connected labels into units, and units of the same kind into groups.

    Args:
        record: The record of both forward passes.
        expansions: The layers to expand.
        exact_only: Whether inexact units are frozen.
        inexact: Further inexact labels beyond those of the record.
    """
    constraints = record.constraints
    unit_facts = UnitFacts(record, expansions, exact_only, inexact)
    root = unit_facts.root

    # Labels that belong to something, are not frozen, and are produced by a voting layer form the units.
    source_of = np.repeat(np.arange(len(constraints.sources)), np.diff(constraints.starts))
    is_owned = np.array([not isinstance(source, Auxiliary) for source in constraints.sources])
    freeze_shared_expansions(record, expansions, unit_facts, source_of, is_owned)
    labels = np.flatnonzero(is_owned[source_of] & (unit_facts.frozen_reason[root] < 0) & unit_facts.votes[root])
    grouped = _Grouping(record, expansions, unit_facts, labels, source_of).groups()

    # Everything else is described from the groups.
    is_output = np.zeros(constraints.num_labels, dtype=bool)
    for vector in record.outputs:
        is_output[root[vector]] = True
    layers = list(record.layers.values())
    outputs = {f.name for f in layers if f.outputs is not None and is_output[root[f.outputs]].any()}
    return Partition(
        root=root,
        groups=[group.group for group in grouped],
        unit_roots=[group.unit_roots for group in grouped],
        frozen=_frozen_layers(layers, unit_facts, grouped),
        patches=_size_rules(record, grouped),
        outputs=outputs,
    )


class _Places:
    """The group of every unit, and the unit's row there.

    Args:
        members: For every group, the numbers of its units in order.
        num_units: Number of units in all groups.
    """

    def __init__(self, members: list[np.ndarray], num_units: int) -> None:
        self.sizes = [len(units) for units in members]
        units = np.concatenate(members)
        self.group, self.row = np.empty(num_units, dtype=np.int64), np.empty(num_units, dtype=np.int64)
        self.group[units] = np.repeat(np.arange(len(members)), self.sizes)
        self.row[units] = np.concatenate([np.arange(size) for size in self.sizes])


@dataclass(eq=False)
class _GroupParts:
    """A group, and what the group itself does not hold.

    Attributes:
        group: The group.
        unit_roots: (units,) roots of its units.
        counts: Whole numbers of modules that count its units, each with a (units, width) table of positions.
    """

    group: ChannelGroup
    unit_roots: Labels
    counts: list[tuple[SizeAttribute, np.ndarray]]


class _Grouping:
    """Groups the units that hold the same number of positions of the same tensors.

    Args:
        record: The record.
        expansions: The layers to expand.
        unit_facts: Facts about the units.
        labels: The labels of all units.
        source_of: (labels of the network,) number of the source of every label.
    """

    def __init__(
        self, record: Record, expansions: Expansions, unit_facts: UnitFacts, labels: Labels, source_of: np.ndarray
    ) -> None:
        self.record, self.expansions, self.unit_facts = record, expansions, unit_facts
        self.layers = list(record.layers.values())
        self.known_tables: dict[tuple[tuple[int, ...], bytes], np.ndarray] = {}
        units = unit_facts.root[labels]
        order = np.argsort(units, kind="stable")  # within a unit by source and position, as labels are numbered
        self.labels, self.units, self.sources = labels[order], units[order], source_of[labels][order]

    def groups(self) -> list[_GroupParts]:
        """Return the groups in the order of the network."""
        if not len(self.labels):
            return []

        # Number the units and sort them into groups.
        is_first = np.diff(self.units, prepend=-1) != 0
        roots, unit_of = self.units[is_first], np.cumsum(is_first) - 1
        first_layer, first_channel = self._first_channels(roots)
        _, group_of = np.unique(self._signatures(roots, unit_of, first_layer), return_inverse=True)
        order = np.lexsort((first_channel, group_of))
        members = np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1)
        members.sort(key=lambda units: (int(first_layer[units[0]]), int(first_channel[units[0]])))

        # Collect the parts of every group.
        places = _Places(members, len(roots))
        tables = self._tables(places, unit_of)
        layers = self._layers(places, roots)
        names = self._names([self.layers[int(first_layer[units[0]])].name for units in members])
        return [
            self._group(name, roots[units], layers[number], tables[number])
            for number, (name, units) in enumerate(zip(names, members, strict=True))
        ]

    def _names(self, first_layers: list[str]) -> list[str]:
        """Return a name for every group: that of its first layer, with a number behind it from the second group on."""
        names: dict[str, None] = {}
        count: dict[str, int] = {}
        for layer in first_layers:
            name = layer
            while name in names or (name != layer and name in self.record.layers):
                count[layer] = count.get(layer, 0) + 1
                name = f"{layer}:{count[layer]}"
            names[name] = None
        return list(names)

    def _signatures(self, roots: Labels, unit_of: np.ndarray, first_layer: np.ndarray) -> np.ndarray:
        """Return a number for every unit; units with equal numbers form a group.

        The number is a hash of how many positions of which sources the unit holds, of its first layer, of the layer
        that is expanded for it, and of the reason why it is inexact.
        """
        num_sources = len(self.record.constraints.sources)
        pairs = unit_of * num_sources + self.sources
        bounds = np.flatnonzero(np.diff(pairs, prepend=-1))
        pair, counts = pairs[bounds], np.diff(bounds, append=len(pairs))
        facts = (pair % num_sources) * 1_000_003 + counts
        signature = np.zeros(len(roots), dtype=np.uint64)
        np.add.at(signature, pair // num_sources, _hashed(facts))
        return (
            signature
            + _hashed(self.unit_facts.inexact_reason[roots] + 8)
            + _hashed(self.unit_facts.expanded[roots] + 1_000_000_007)
            + _hashed(first_layer + 3_000_000_019)
        )

    def _first_channels(self, roots: Labels) -> tuple[np.ndarray, np.ndarray]:
        """Return, for every unit, the number of its first voting layer and its lowest channel in that layer."""
        num_labels = self.record.constraints.num_labels
        layer = np.full(num_labels, len(self.layers))
        channel = np.zeros(num_labels, dtype=np.int64)
        for number in range(len(self.layers) - 1, -1, -1):
            facts = self.layers[number]
            if votes(facts, self.expansions) and facts.outputs is not None:
                reversed_outputs = facts.outputs[::-1]
                layer[self.unit_facts.root[reversed_outputs]] = number
                channel[self.unit_facts.root[reversed_outputs]] = np.arange(len(reversed_outputs))[::-1]
        return layer[roots], channel[roots]

    def _tables(self, places: _Places, unit_of: np.ndarray) -> list[list[tuple[TensorDim | SizeAttribute, np.ndarray]]]:
        """Return, for every group, its sources and the (units, width) positions that its units hold there."""
        constraints = self.record.constraints
        starts = np.array(constraints.starts)
        part = places.group[unit_of] * len(constraints.sources) + self.sources
        order = np.argsort(part * (max(places.sizes) + 1) + places.row[unit_of], kind="stable")
        number, sources = places.group[unit_of[order]], self.sources[order]
        positions = self.labels[order] - starts[sources]
        bounds = np.flatnonzero(np.diff(part[order], prepend=-1, append=-1)).tolist()
        tables: list[list[tuple[TensorDim | SizeAttribute, np.ndarray]]] = [[] for _ in places.sizes]
        for first, last in pairwise(bounds):
            group = int(number[first])
            source = constraints.sources[int(sources[first])]
            assert not isinstance(source, Auxiliary)
            index = self._shared(positions[first:last].reshape(places.sizes[group], -1))
            tables[group].append((source, index))
        return tables

    def _shared(self, index: np.ndarray) -> np.ndarray:
        """Return one read-only table for all tables with these contents.

        Most tables of a group are equal, and surgery transfers a shared table to the device once.
        """
        key = (index.shape, index.tobytes())
        if key not in self.known_tables:
            table = self.known_tables[key] = np.array(index, dtype=np.int64)
            table.setflags(write=False)
        return self.known_tables[key]

    def _layers(self, places: _Places, roots: Labels) -> list[list[LayerUnits]]:
        """Return, for every group, the filters of every layer that its units hold, voting layers first."""
        unit_of = np.full(self.record.constraints.num_labels, -1)
        unit_of[roots] = np.arange(len(roots))
        parts: list[list[LayerUnits]] = [[] for _ in places.sizes]
        for facts in self.layers:
            if facts.outputs is None:
                continue
            unit = unit_of[self.unit_facts.root[facts.outputs]]
            channels = np.flatnonzero(unit >= 0)
            number, row = places.group[unit[channels]], places.row[unit[channels]]
            order = np.lexsort((channels, row, number))
            bounds = np.flatnonzero(np.diff(number[order])) + 1
            for part in np.split(order, bounds) if len(order) else []:
                group = int(number[part[0]])
                index = self._shared(channels[part].reshape(places.sizes[group], -1))
                parts[group].append(LayerUnits(facts.name, index, votes(facts, self.expansions)))
        return [sorted(part, key=lambda layer: not layer.votes) for part in parts]

    def _group(
        self,
        name: str,
        unit_roots: Labels,
        layers: list[LayerUnits],
        tables: list[tuple[TensorDim | SizeAttribute, np.ndarray]],
    ) -> _GroupParts:
        expanded = int(self.unit_facts.expanded[unit_roots[0]])
        inexact = int(self.unit_facts.inexact_reason[unit_roots[0]])
        slices = [Slice(*source, index) for source, index in tables if isinstance(source, TensorDim)]
        group = ChannelGroup(
            name=name,
            kind="remove" if expanded < 0 else "expand",
            original_size=len(unit_roots),
            kept=tuple(range(len(unit_roots))),
            filters=sum(part.index.shape[1] for part in layers),
            layers=tuple(layers),
            slices=tuple(part for part in slices if not is_index_buffer(part.tensor)),
            expansion=None if expanded < 0 else self._expansion(self.layers[expanded]),
            inexact=None if inexact < 0 else self.unit_facts.inexact_reasons[inexact],
        )
        counts = [(source, index) for source, index in tables if isinstance(source, SizeAttribute)]
        return _GroupParts(group, unit_roots, counts)

    def _expansion(self, facts: LayerFacts) -> Expansion:
        module = self.expansions.layers[facts.name]
        gathers = self.expansions.gathers(facts.name)
        known = self.record.expanded.get(module)
        if known is not None:
            return Expansion(module, *known, gathers=gathers)
        key = BoundaryKey(module)
        dim = next((b.dim for b in self.record.constraints.boundaries if b.key == key), -1)
        return Expansion(module, dim, facts.num_filters, gathers)


def _hashed(numbers: np.ndarray) -> np.ndarray:
    """Return 64-bit hashes (splitmix64), spread so well that sums of different sets of them differ."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _frozen_layers(layers: list[LayerFacts], unit_facts: UnitFacts, groups: list[_GroupParts]) -> dict[str, str]:
    """Return, for every layer with filters in no group, the reason why these stay."""
    is_grouped = np.zeros(len(unit_facts.root), dtype=bool)
    for group in groups:
        is_grouped[group.unit_roots] = True
    frozen = {}
    for facts in layers:
        if facts.outputs is None:
            frozen[facts.name] = "its filters cannot be told apart in its output"
            continue
        own = unit_facts.root[facts.outputs]
        stay = own[~is_grouped[own]]
        if len(stay):
            numbers = unit_facts.frozen_reason[stay]
            numbers = numbers[numbers >= 0]
            frozen[facts.name] = unit_facts.frozen_reasons[int(numbers[0])] if len(numbers) else _NO_VOTE
    return frozen


def _size_rules(record: Record, groups: list[_GroupParts]) -> dict[SizeAttribute, SizeRule]:
    """Return how the whole numbers that modules keep follow from the groups."""
    sizes = {
        source: stop - start for source, start, stop in record.constraints.ranges() if isinstance(source, SizeAttribute)
    }
    rules: dict[SizeAttribute, SizeRule] = {}
    for group in groups:
        for attribute, index in group.counts:
            rule = rules.get(attribute, SizeRule(sizes[attribute]))
            per_unit = {**rule.per_unit, group.group.name: index.shape[1]}
            rules[attribute] = SizeRule(rule.base - index.size, per_unit)

    for attribute in record.unneeded:
        rules.pop(attribute, None)

    # An element that no group changes is listed if another element of the same list is.
    changed_lists = {(a.module, a.name) for a in rules if a.element is not None}
    for attribute, size in sizes.items():
        if attribute.element is not None and (attribute.module, attribute.name) in changed_lists:
            rules.setdefault(attribute, SizeRule(size))
    return rules

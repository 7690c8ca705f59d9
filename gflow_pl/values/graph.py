"""The result of a trace: which channels belong together, and why the others are frozen."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gflow_pl.common.errors import SettingsError
from gflow_pl.values.groups import ChannelGroup, Expansion, Layer, LayerUnits, Slice
from gflow_pl.values.size_rules import SizeAttribute, SizeRule, size_rules_as_dict, size_rules_from_dict

__all__ = ["ChannelGraph"]


@dataclass(eq=False)
class ChannelGraph:
    """The groups of a network, its frozen layers, and what is needed to compute costs.

    A graph holds names and numbers, but no modules or tensors of the network. The same graph therefore serves the
    model, a deepcopy of it, an EMA model and the initial weights. `rewrite` updates the graph, so that further rounds
    need no new trace.

    Attributes:
        groups: The groups of units that can be removed or expanded, in the order of the network.
        frozen: Layer name to the reason why (some of) its filters cannot be pruned.
        layers: Name to every conv, transposed conv and linear layer, and to every weight that a module uses like one.
        shapes: Name of every parameter and buffer to its present shape.
        uses: Weight name to the number of multiply-accumulates for one example, per element of that weight. Times the
            number of its elements, this is the cost of the layer, before and after any plan.
        patches: Whole numbers that modules keep (num_heads, split sizes, ...) to how they follow from the groups.
        buffers: Names in `shapes` that are buffers. They are not counted as parameters.
    """

    groups: list[ChannelGroup]
    frozen: dict[str, str] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    patches: dict[SizeAttribute, SizeRule] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()

    def group(self, name: str) -> ChannelGroup:
        """Return the group of that name.

        Raises:
            KeyError: There is none. The message lists the names of all groups.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"No group '{name}'. Known: {', '.join(g.name for g in self.groups)}.")

    def patched_attributes(self, groups: Iterable[ChannelGroup]) -> dict[str, dict[str, int | list[int | None]]]:
        """Return the whole numbers in `patches` for groups of other sizes.

        Args:
            groups: The groups after a plan, or `self.groups` for the present numbers.

        Returns:
            Module name to attribute name to value. The value of a list has None for elements that follow from no group.
        """
        sizes = {group.name: group.size for group in groups}
        patched: dict[str, dict[str, int | list[int | None]]] = {}
        for (module, name, element), rule in self.patches.items():
            values = patched.setdefault(module, {})
            if element is None:
                values[name] = rule.value(sizes)
            else:
                elements = values.setdefault(name, [])
                assert isinstance(elements, list), f"'{name}' of '{module}' is a number and a list at once"
                elements += [None] * (element + 1 - len(elements))
                elements[element] = rule.value(sizes)
        return patched

    @property
    def num_filters(self) -> int:
        """Number of filters present in the layers of groups, which pruning fractions refer to."""
        return sum(group.num_filters for group in self.leaders)

    @property
    def leaders(self) -> list[ChannelGroup]:
        """The groups that are ranked and counted: all but those of copies, which follow another group."""
        return [group for group in self.groups if group.follows is None]

    def coverage(self) -> float:
        """Return the share of conv and linear output channels that are in groups; the model's outputs do not count."""
        prunable: dict[str, int] = {}
        for group in self.groups:
            for part in group.layers:
                prunable[part.layer] = prunable.get(part.layer, 0) + part.index.size
        counted = [layer for layer in self.layers.values() if not layer.is_output]
        total = sum(layer.num_filters for layer in counted)
        return sum(prunable.get(layer.name, 0) for layer in counted) / total if total else 0.0

    def copy(self) -> ChannelGraph:
        """Return an independent copy, which a `rewrite` of another network can update."""
        return copy.copy(self).updated(list(self.groups), dict(self.shapes), dict(self.layers))

    def updated(
        self, groups: list[ChannelGroup], shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, Layer]
    ) -> ChannelGraph:
        """Replace what a rewrite changes, in place, and return the graph."""
        self.groups, self.shapes, self.layers = groups, dict(shapes), dict(layers)
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the graph as names, numbers and integer tensors, which load with ``weights_only=True``."""
        return {
            "version": 1,
            "groups": [_group_to_plain(group) for group in self.groups],
            "frozen": dict(self.frozen),
            "layers": [asdict(layer) for layer in self.layers.values()],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "uses": dict(self.uses),
            "patches": size_rules_as_dict(self.patches),
            "buffers": sorted(self.buffers),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChannelGraph:
        """Return the graph that `as_dict` described.

        Raises:
            SettingsError: The data has another version.
        """
        if data.get("version") != 1:
            raise SettingsError(f"Channel graph: expected plain data of version 1, got {data.get('version')!r}.")
        return cls(
            groups=[_group_from_plain(group) for group in data["groups"]],
            frozen=dict(data["frozen"]),
            layers={layer["name"]: Layer(**layer) for layer in data["layers"]},
            shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
            uses=dict(data["uses"]),
            patches=size_rules_from_dict(data["patches"]),
            buffers=frozenset(data["buffers"]),
        )

    def __str__(self) -> str:
        """Return a table of the layers: number of filters, groups, and what happens to the filters."""
        # The groups of every layer.
        in_groups: dict[str, list[ChannelGroup]] = {}
        for group in self.groups:
            for part in group.layers:
                in_groups.setdefault(part.layer, []).append(group)
        # One row for every layer.
        rows = [("layer", "filters", "group", "what happens")]
        for layer in self.layers.values():
            groups = in_groups.get(layer.name, [])
            names = ", ".join(dict.fromkeys(g.name for g in groups)) or "-"
            what = ", ".join(dict.fromkeys({"remove": "removed", "expand": "expanded"}[g.kind] for g in groups))
            inexact = next((g.inexact for g in groups if g.inexact), None)
            if inexact:
                what += f" (not exact: {inexact})"
            if layer.name in self.frozen:
                what = f"{what}; " * bool(what) + f"frozen: {self.frozen[layer.name]}"
            rows.append((layer.name, str(layer.num_filters), names, what))
        # Columns of equal width; the last one ends where its text ends.
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(r[:3], widths, strict=True)), r[3]]).rstrip() for r in rows
        )


_PLAIN_FIELDS = ("name", "kind", "original_size", "filters", "inexact")


def _group_to_plain(group: ChannelGroup) -> dict[str, Any]:
    plain = {name: getattr(group, name) for name in (*_PLAIN_FIELDS, "follows")}
    return {
        **plain,
        "kept": torch.tensor(group.kept, dtype=torch.int64),
        "layers": [{"layer": p.layer, "index": torch.tensor(p.index), "votes": p.votes} for p in group.layers],
        "slices": [{"tensor": s.tensor, "dim": s.dim, "index": torch.tensor(s.index)} for s in group.slices],
        "expansion": None if group.expansion is None else asdict(group.expansion),
    }


def _group_from_plain(data: dict[str, Any]) -> ChannelGroup:
    return ChannelGroup(
        **{name: data[name] for name in _PLAIN_FIELDS},
        follows=data.get("follows"),  # missing in older files
        kept=tuple(data["kept"].tolist()),
        layers=tuple(LayerUnits(p["layer"], p["index"].cpu().numpy(), p["votes"]) for p in data["layers"]),
        slices=tuple(Slice(s["tensor"], s["dim"], s["index"].cpu().numpy()) for s in data["slices"]),
        expansion=None if data["expansion"] is None else Expansion(**data["expansion"]),
    )

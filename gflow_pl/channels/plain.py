"""A graph as plain data: names, numbers and integer tensors, for a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from gflow_pl.channels.graph import ChannelGraph
from gflow_pl.types import ChannelGroup, Expansion, Layer, LayerUnits, Slice

__all__ = ["graph_from_plain", "graph_to_plain"]


def graph_to_plain(graph: ChannelGraph) -> dict[str, Any]:
    """What `graph_from_plain` needs; loads with ``weights_only=True``."""
    return {
        "version": 1,
        "groups": [_group_to_plain(group) for group in graph.groups],
        "frozen": dict(graph.frozen),
        "layers": [asdict(layer) for layer in graph.layers.values()],
        "shapes": {name: list(shape) for name, shape in graph.shapes.items()},
        "uses": dict(graph.uses),
        "patches": _plain(graph.patches),
        "buffers": sorted(graph.buffers),
    }


def graph_from_plain(data: dict[str, Any]) -> ChannelGraph:
    """The graph that `graph_to_plain` described.

    Raises:
        ValueError: The data is of another version.
    """
    if data.get("version") != 1:
        raise ValueError(f"Channel graph: expected plain data of version 1, got {data.get('version')!r}.")
    return ChannelGraph(
        groups=[_group_from_plain(group) for group in data["groups"]],
        frozen=dict(data["frozen"]),
        layers={layer["name"]: Layer(**layer) for layer in data["layers"]},
        shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
        uses=dict(data["uses"]),
        patches=data["patches"],
        buffers=frozenset(data["buffers"]),
    )


def _plain(value: Any) -> Any:
    """Dicts and lists all the way down; tuples become lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _group_to_plain(group: ChannelGroup) -> dict[str, Any]:
    plain = {name: getattr(group, name) for name in ("name", "kind", "original_size", "filters", "inexact")}
    return {
        **plain,
        "kept": torch.tensor(group.kept, dtype=torch.int64),
        "layers": [{"layer": p.layer, "index": torch.tensor(p.index), "votes": p.votes} for p in group.layers],
        "slices": [{"tensor": s.tensor, "dim": s.dim, "index": torch.tensor(s.index)} for s in group.slices],
        "expansion": None if group.expansion is None else asdict(group.expansion),
    }


def _group_from_plain(data: dict[str, Any]) -> ChannelGroup:
    return ChannelGroup(
        **{name: data[name] for name in ("name", "kind", "original_size", "filters", "inexact")},
        kept=tuple(data["kept"].tolist()),
        layers=tuple(LayerUnits(p["layer"], p["index"].cpu().numpy(), p["votes"]) for p in data["layers"]),
        slices=tuple(Slice(s["tensor"], s["dim"], s["index"].cpu().numpy()) for s in data["slices"]),
        expansion=None if data["expansion"] is None else Expansion(**data["expansion"]),
    )

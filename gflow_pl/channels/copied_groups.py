"""Groups of the copies of a part of a network, which follow the groups of that part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gflow_pl.values import ChannelGraph, ChannelGroup, Slice

__all__ = ["add_copied_groups"]


def add_copied_groups(graph: ChannelGraph, copies: Mapping[str, str]) -> ChannelGraph:
    """Add to a graph what belongs to the copies of parts of its network, in place, and return it.

    A group that has layers in the part is repeated for the copy, and the new group follows it. The slices that a copy
    holds of any other group become slices of that group.

    Args:
        graph: The graph, in which only the parts themselves occur.
        copies: Name of the copy's module to the name of the module that it copies.
    """
    for copy, source in copies.items():
        renamed = _Renamed(copy, source)
        groups: list[ChannelGroup] = []
        followers: dict[str, str] = {}  # group of the part to the group of the copy
        for group in graph.groups:
            slices = [replace(part, tensor=renamed(part.tensor)) for part in group.slices if renamed.has(part.tensor)]
            layers = [replace(part, layer=renamed(part.layer)) for part in group.layers if renamed.has(part.layer)]
            if not layers or group.follows is not None:
                groups.append(_with_slices(group, slices if group.follows is None else []))
                continue
            name = renamed(group.name) if renamed.has(group.name) else _unused(layers[0].layer, graph, followers)
            expansion = group.expansion
            if expansion is not None:
                expansion = replace(expansion, module=renamed(expansion.module))
            groups += [
                group,
                group.with_parts(
                    name=name,
                    filters=sum(part.index.shape[1] for part in layers),
                    layers=tuple(replace(part, votes=False) for part in layers),
                    slices=tuple(slices),
                    expansion=expansion,
                    follows=group.name,
                ),
            ]
            followers[group.name] = name
        graph.groups = groups
        _add_facts(graph, renamed)
    return graph


class _Renamed:
    """Names of the parts of a network as names of the parts of a copy.

    Args:
        copy: Name of the copy's module.
        source: Name of the module that it copies.
    """

    def __init__(self, copy: str, source: str) -> None:
        self._copy, self._source = copy, source

    def has(self, name: str) -> bool:
        """Return whether a name is that of the copied module or of something in it."""
        return name == self._source or name.startswith(f"{self._source}.")

    def __call__(self, name: str) -> str:
        return self._copy + name[len(self._source) :]


def _with_slices(group: ChannelGroup, slices: list[Slice]) -> ChannelGroup:
    return group.with_parts(slices=(*group.slices, *slices)) if slices else group


def _unused(name: str, graph: ChannelGraph, followers: Mapping[str, str]) -> str:
    """Return a name for a group that no other group has."""
    taken = {group.name for group in graph.groups} | set(followers.values())
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}:{number}"
    return free


def _add_facts(graph: ChannelGraph, renamed: _Renamed) -> None:
    """Add the layers of a copy, the reasons why some are frozen, and the numbers that its modules keep."""
    layers = [layer for name, layer in graph.layers.items() if renamed.has(name)]
    for layer in layers:
        norm = layer.norm if layer.norm is None or not renamed.has(layer.norm) else renamed(layer.norm)
        weight = renamed(layer.weight) if renamed.has(layer.weight) else layer.weight
        graph.layers[renamed(layer.name)] = replace(layer, name=renamed(layer.name), weight=weight, norm=norm)
    for name, reason in [*graph.frozen.items()]:
        if renamed.has(name):
            graph.frozen[renamed(name)] = reason
    for attribute, rule in [*graph.patches.items()]:
        if renamed.has(attribute.module):
            graph.patches[attribute._replace(module=renamed(attribute.module))] = rule

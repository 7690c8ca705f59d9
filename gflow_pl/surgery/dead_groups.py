"""Groups that can be removed whole, because only emptied layers read their units."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gflow_pl.surgery.emptied import output_width
from gflow_pl.surgery.plan_masks import PlanMasks
from gflow_pl.values import ChannelGraph, ChannelGroup, Slice

__all__ = ["find_dead_groups"]


def find_dead_groups(modules: Mapping[str, nn.Module], graph: ChannelGraph, masks: PlanMasks) -> set[str]:
    """Return the groups whose units no layer reads after a plan: every layer that reads them is emptied or dead.

    Only groups for which this is certain are returned. A group is left alone, which costs time but no exactness, if
    zeros of a single channel might not replace its units (a unit has several channels of its layer, an attribute of
    another module counts the units, or a norm contains channels of other groups too), or if an unknown type of module
    holds one of its tensors.

    Args:
        modules: Modules of the network by name.
        graph: The graph before the plan.
        masks: The plan.
    """
    emptied = {name for name, layer in graph.layers.items() if layer.num_filters == 0}
    emptied |= {name for name, kept in masks.channels.items() if not kept.any()}
    if not emptied:
        return set()
    candidates = _candidates(modules, graph, masks)
    # Groups may read each other (squeeze and excitation), so assume that all candidates are dead and discard those that
    # are not, until nothing changes.
    while True:
        shared = _groups_in_shared_modules(candidates, graph, masks, modules)
        candidates = {name: readers for name, readers in candidates.items() if name not in shared}
        without_filters = emptied | _layers_emptied_by(set(candidates), graph, masks)
        dead = _reached_from_emptied(candidates, emptied, without_filters, graph)
        if dead.keys() == candidates.keys() and not _groups_in_shared_modules(dead, graph, masks, modules):
            return set(dead)
        candidates = dead


def _candidates(modules: Mapping[str, nn.Module], graph: ChannelGraph, masks: PlanMasks) -> dict[str, set[str]]:
    """Return the groups that may be dead, with the names of the layers that read them."""
    # Groups whose number of units is stored as an attribute of a module that is not a layer, such as the number of
    # heads.
    counted = {
        group
        for attribute, rule in graph.patches.items()
        if output_width(modules[attribute.module]) is None
        for group in rule.per_unit
    }
    return {
        group.name: readers
        for group in graph.groups
        if group.kind == "remove" and masks.units[group.name].any() and group.name not in counted
        if all(layer.index.shape[1] == 1 for layer in group.layers if layer.votes)
        if (readers := _readers(group, modules))
    }


def _reached_from_emptied(
    candidates: Mapping[str, set[str]], emptied: set[str], without_filters: set[str], graph: ChannelGraph
) -> dict[str, set[str]]:
    """Return the candidates that are dead because of emptied layers, searched backwards from the emptied layers.

    A candidate is dead, its channels have no effect, if no layer that reads it has filters left, and if at least one of
    these layers was emptied or belongs to a dead group. Without the second condition, groups in a loop that read only
    each other would count as dead.

    Args:
        candidates: Group name to the layers that read it.
        emptied: Layers that the plan empties, or that are emptied already.
        without_filters: Layers that have no filters left if all candidates are dead.
        graph: The graph.
    """
    reached = set(emptied)
    dead: dict[str, set[str]] = {}
    while more := {
        name: readers
        for name, readers in candidates.items()
        if name not in dead and readers <= without_filters and readers & reached
    }:
        dead |= more
        reached |= {layer.layer for group in graph.groups if group.name in more for layer in group.layers}
    return dead


def _layers_emptied_by(dead: set[str], graph: ChannelGraph, masks: PlanMasks) -> set[str]:
    """Return the layers that lose their last filters if some groups are dead."""
    stays: dict[str, np.ndarray] = {}
    for group in graph.groups:
        for part in group.layers if group.name in dead else ():
            if part.layer in graph.layers:
                all_filters = np.ones(graph.layers[part.layer].num_filters, dtype=bool)
                stays.setdefault(part.layer, masks.channels.get(part.layer, all_filters).copy())[part.index] = False
    return {name for name, mask in stays.items() if not mask.any()}


def _groups_in_shared_modules(
    dead: Collection[str], graph: ChannelGraph, masks: PlanMasks, modules: Mapping[str, nn.Module]
) -> set[str]:
    """Return those of the dead groups that share a module with channels that stay, layers that read them aside.

    Such a module (a norm over concatenated layers) still runs, so it needs all of its channels.
    """
    stays: dict[tuple[str, int], np.ndarray] = {}
    dims_of: dict[str, list[tuple[str, int]]] = {}
    for group in graph.groups:
        for part in group.slices if group.name in dead else ():
            if not _is_input_of_layer(part, modules):
                key = (part.tensor, part.dim)
                all_positions = np.ones(graph.shapes[part.tensor][part.dim], dtype=bool)
                stays.setdefault(key, masks.positions.get(key, all_positions).copy())[part.index] = False
                dims_of.setdefault(group.name, []).append(key)
    return {name for name, keys in dims_of.items() if any(stays[key].any() for key in keys)}


def _is_input_of_layer(part: Slice, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a slice is made of input channels of a conv, transposed conv or linear layer."""
    name, _, leaf = part.tensor.rpartition(".")
    module = modules.get(name)
    return (
        isinstance(module, (_ConvNd, nn.Linear))
        and leaf == "weight"
        and part.dim != int(isinstance(module, _ConvTransposeNd))
    )


def _readers(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the layers that read the units of a group; an empty set if a module of unknown type may read them."""
    producers, readers = {layer.layer for layer in group.layers}, set()
    for part in group.slices:
        name = part.tensor.rpartition(".")[0]
        module = modules.get(name)
        if module is None or output_width(module) is None:
            return set()
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        if _is_input_of_layer(part, modules):
            readers.add(name)
        elif name not in producers:
            return set()
    return readers

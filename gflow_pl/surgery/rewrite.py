"""Carrying out a plan: every tensor, optimizer, copy and table takes the pruned shape, either all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gflow_pl.common.errors import SettingsError
from gflow_pl.common.optimizers import OptimizerLike
from gflow_pl.common.own_width_attention import is_torch_attention, update_attention
from gflow_pl.surgery.dead_groups import find_dead_groups
from gflow_pl.surgery.emptied import update_emptiness
from gflow_pl.surgery.expansion import Placement, expansion_of, gather_of, set_expansion, set_gather
from gflow_pl.surgery.module_attributes import (
    attributes_from_shapes,
    groups_after_cut,
    local_shapes,
    set_attribute,
)
from gflow_pl.surgery.module_structure import structure_from
from gflow_pl.surgery.optimizer_state import cut_state, drop_empty_parameters
from gflow_pl.surgery.placement_guard import restore_all, update_guards
from gflow_pl.surgery.plan_masks import PlanMasks, masks_of_plan, renumbered
from gflow_pl.surgery.tensor_table import Cut, TensorTable, cut_tensor
from gflow_pl.values import ChannelGraph, ChannelGroup, Structure

__all__ = ["rewrite"]

Commit = Callable[[], object]
"""A call that assigns a value that is computed already, and cannot fail."""

Copy = nn.Module | MutableMapping[str, Tensor]
"""A module of the model's shape, or a dict of tensors by parameter name."""


def rewrite(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Mapping[str, Tensor],
    *,
    optimizers: Iterable[OptimizerLike] = (),
    copies: Iterable[Copy] = (),
) -> Structure:
    """Remove the units that a plan does not keep from a network, physically and in place.

    Parameters stay the same objects, with their dtype, device, memory format, ``requires_grad`` and hooks, so
    optimizers, schedulers and tied weights keep working. All gradients of the model are dropped.

    Everything is computed before anything is assigned: after an error, model, graph, optimizers and copies are
    unchanged.

    Objects outside of the model that store its shapes are not changed: build a DistributedDataParallel wrapper anew,
    and compile a compiled model again.

    Args:
        model: The network that the graph was traced from.
        graph: Result of `trace_channels`. It is updated in place, so the next plan needs no new trace.
        plan: Group name to a bool vector over the units now present (True = keep). A group that is missing is kept
            whole.
        optimizers: torch optimizers, or wrappers that hold one as ``.optimizer``, whose state is cut together with the
            parameters.
        copies: Objects with the shape of the model that are cut in the same way: other modules (an average of the
            weights), or dicts of tensors by parameter name (initial weights).

    Returns:
        The new structure of the model.

    Raises:
        SettingsError: The plan does not fit the graph or would empty a group whose units are removed, the graph does
            not fit the model or a copy, or the state of an optimizer cannot be cut.
    """
    # Tensors that are created in inference mode could not be trained.
    with torch.inference_mode(False), torch.no_grad():
        # The plan, with the groups that no layer reads any longer.
        optimizers, copies = list(optimizers), list(copies)
        masks = masks_of_plan(graph, plan)
        table = TensorTable(model)
        dead = _consistent(find_dead_groups(table.modules, graph, masks), graph)
        if dead:
            masks = masks_of_plan(graph, plan, dead=dead)
        after = graph.copy().updated(*renumbered(graph, masks))
        # Compute everything.
        cuts = _cuts_by_tensor(masks)
        tables = [table, *(TensorTable(copy) for copy in copies if isinstance(copy, nn.Module))]
        for network in tables:
            restore_all(network.modules.values())
        commits: list[Commit] = []
        for network in tables:
            commits += _rewrite_network(network, graph, masks, cuts, after)
        for tensors in copies:
            if not isinstance(tensors, nn.Module):
                commits += _cut_dict(tensors, table, cuts, graph)
        by_parameter = {table[name].tensor: ops for name, ops in cuts.items() if table[name].is_parameter}
        commits += cut_state(optimizers, by_parameter)
        # Assign everything.
        for commit in commits:
            commit()
        if any(group.size == 0 for group in after.groups):
            drop_empty_parameters(optimizers)
        for entry in (entry for network in tables for entry in network.values() if entry.is_parameter):
            entry.tensor.grad = None
        graph.updated(after.groups, after.shapes, after.layers)
        return structure_from(table)


def _consistent(dead: set[str], graph: ChannelGraph) -> set[str]:
    """Return the dead groups without those of which a copy, or the group that it follows, is not dead."""
    alive = {group.follows or group.name for group in graph.groups if group.name not in dead}
    return {group.name for group in graph.groups if group.name in dead and (group.follows or group.name) not in alive}


def _cuts_by_tensor(masks: PlanMasks) -> dict[str, list[Cut]]:
    """Return the cuts of every tensor that loses positions, by name."""
    cuts: dict[str, list[Cut]] = {}
    kept: dict[int, Tensor] = {}  # by identity of the mask: a layer and its norm share theirs
    for (tensor, dim), mask in masks.positions.items():
        if id(mask) not in kept:
            kept[id(mask)] = torch.from_numpy(mask.nonzero()[0])
        if len(kept[id(mask)]) < len(mask):
            cuts.setdefault(tensor, []).append(Cut(dim, kept[id(mask)]))
    return cuts


def _rewrite_network(
    table: TensorTable,
    graph: ChannelGraph,
    masks: PlanMasks,
    cuts: Mapping[str, list[Cut]],
    after: ChannelGraph,
) -> list[Commit]:
    """Compute the pruned form of one network, the model or a copy, and return the calls that assign it.

    Args:
        table: Tensors of the network.
        graph: The graph before the cut.
        masks: The plan.
        cuts: Cuts by tensor name.
        after: The graph after the cut.
    """
    commits = _cut_tensors(table, graph, cuts)
    commits += _update_attributes(table, masks, cuts, after)
    for group in graph.groups:
        if group.expansion is not None:
            commits.append(_update_expansion(table.modules, group, masks))
            if group.expansion.gathers:
                commits.append(_update_gather(table.modules, group, masks))
    if any(group.size == 0 for group in after.groups):
        commits += [partial(update_emptiness, module) for module in table.modules.values()]
    commits += [partial(update_attention, module) for module in table.modules.values() if is_torch_attention(module)]
    return [*commits, partial(update_guards, table.modules)]


def _cut_tensors(table: TensorTable, graph: ChannelGraph, cuts: Mapping[str, list[Cut]]) -> list[Commit]:
    """Compute the cut parameters and buffers of a network, and return the calls that will assign them."""
    commits: list[Commit] = []
    for name, ops in cuts.items():
        _check_shape(name, table[name].tensor if name in table else None, graph)
        entry = table[name]
        value = cut_tensor(entry.tensor, ops)
        if entry.persistent:
            commits.append(partial(entry.put, value))
        else:
            # A buffer outside of the state dict would be lost in a file: also record its values as module attributes,
            # which a `Structure` contains.
            commits += [partial(set_attribute, module, leaf, value, record=True) for module, leaf in entry.places]
    return commits


def _update_attributes(
    table: TensorTable, masks: PlanMasks, cuts: Mapping[str, list[Cut]], after: ChannelGraph
) -> list[Commit]:
    """Compute the numbers that modules store beside their tensors, and return the calls that set them."""
    commits: list[Commit] = []
    modules = table.modules
    # Numbers that follow from the shapes of the module's own tensors.
    all_local = local_shapes(table, {name: after.shapes[name] for name in cuts})
    for module_name, local in all_local.items():
        module = modules[module_name]
        values = attributes_from_shapes(module, local)
        kept = masks.channels.get(module_name)
        if isinstance(module, _ConvNd) and module.groups > 1 and not module.transposed and kept is not None:
            # The weight may be computed from other tensors; then the inputs of one group follow from the attributes.
            computed = values.get("in_channels", module.in_channels) // values.get("groups", module.groups)
            values["groups"] = groups_after_cut(module.groups, torch.from_numpy(kept))
            values["in_channels"] = local.get("weight", (0, computed))[1] * values["groups"]
        commits += [partial(set_attribute, module, name, value, record=False) for name, value in values.items()]
    # Numbers that follow from the sizes of groups (num_heads, split sizes).
    for module_name, patches in after.patched_attributes(after.groups).items():
        module = modules[module_name]
        is_layer = isinstance(module, (_ConvNd, nn.Linear)) and module_name in after.layers
        if is_layer and after.layers[module_name].num_filters == 0:
            continue  # An emptied layer keeps its numbers: a convolution with 0 groups would be refused.
        from_shapes = attributes_from_shapes(module, all_local.get(module_name, {}))
        for name, value in patches.items():
            complete = _with_unpatched_items(module, name, value)
            commits.append(partial(set_attribute, module, name, complete, record=name not in from_shapes))
    return commits


def _check_shape(name: str, tensor: Tensor | None, graph: ChannelGraph) -> None:
    """Raise if a tensor that is cut is missing or has another shape than in the graph."""
    found = None if tensor is None else tuple(tensor.shape)
    if found != tuple(graph.shapes[name]):
        raise SettingsError(
            f"For tensor '{name}' the graph has shape {tuple(graph.shapes[name])}, the network has {found}: "
            "pass the network that was traced, or a copy of it, in its present shape, or trace it again."
        )


def _with_unpatched_items(module: nn.Module, name: str, value: object) -> object:
    """Return the new value of an attribute; items that are None in a list are taken from the present value."""
    if not isinstance(value, list):
        return value
    present = list(getattr(module, name))
    return [old if new is None else new for old, new in zip_longest(present, value)]


def _update_expansion(modules: Mapping[str, nn.Module], group: ChannelGroup, masks: PlanMasks) -> Commit:
    """Compute the new expansion of an "expand" group, and return the call that sets it.

    The expanded module has one output channel for each filter of the group's first layer.
    """
    assert group.expansion is not None
    expansion = group.expansion
    module = modules[expansion.module]
    present = expansion_of(module)
    positions = np.arange(expansion.width) if present is None else np.asarray(present["index"])
    kept = masks.channels.get(group.layers[0].layer)
    if kept is not None:
        if len(kept) != len(positions):
            raise SettingsError(
                f"Group '{group.name}': '{expansion.module}' has {len(positions)} output channels, its layer has "
                f"{len(kept)} filters: the graph does not fit the network, trace it again."
            )
        positions = positions[kept]
    return partial(set_expansion, module, Placement(expansion.dim, expansion.width, positions.tolist()))


def _update_gather(modules: Mapping[str, nn.Module], group: ChannelGroup, masks: PlanMasks) -> Commit:
    """Compute the new gather of an expanded grouped convolution, and return the call that sets it.

    The convolution reads the input channels of those of its own groups (``module.groups``) that still have filters.
    """
    assert group.expansion is not None
    name = group.layers[0].layer
    module, kept = modules[name], masks.channels.get(name)
    assert isinstance(module, _ConvNd)
    present = gather_of(module)
    width = module.in_channels if present is None else present["width"]
    positions = np.arange(width) if present is None else np.asarray(present["index"])
    if kept is not None and len(kept):
        has_filters = kept.reshape(module.groups, -1).any(1)  # for each of these groups
        positions = positions[np.repeat(has_filters, len(positions) // module.groups)]
    return partial(set_gather, module, Placement(group.expansion.dim, width, positions.tolist()))


def _cut_dict(
    tensors: MutableMapping[str, Tensor], table: TensorTable, cuts: Mapping[str, list[Cut]], graph: ChannelGraph
) -> list[Commit]:
    """Cut the tensors in a dict by parameter name, and return the calls that assign them.

    Other entries are left alone.
    """
    commits: list[Commit] = []
    for alias, tensor in tensors.items():
        name = table.aliases.get(alias, alias)
        if name in cuts:
            _check_shape(name, tensor, graph)
            commits.append(partial(tensors.__setitem__, alias, cut_tensor(tensor, cuts[name])))
    return commits

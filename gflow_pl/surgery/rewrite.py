"""Obey a plan: every tensor, optimizer, copy and table gets the pruned shape, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gflow_pl.common.optimizers import OptimizerLike
from gflow_pl.surgery.emptied import dead_groups, drop_empty_parameters, follow_emptiness
from gflow_pl.surgery.expansion import expansion_of, gather_of, set_expansion, set_gather
from gflow_pl.surgery.module_attributes import conv_groups, follow_shapes, local_shapes, set_attribute
from gflow_pl.surgery.module_structure import structure_from
from gflow_pl.surgery.optimizer_state import cut_state
from gflow_pl.surgery.plan_masks import Decision, decide, renumbered
from gflow_pl.surgery.tensor_table import Cut, TensorTable, cut_tensor
from gflow_pl.values import ChannelGraph, ChannelGroup, Structure

__all__ = ["rewrite"]

Commit = Callable[[], Any]
Copy = nn.Module | MutableMapping[str, Tensor]


def rewrite(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Mapping[str, Tensor],
    *,
    optimizers: Iterable[OptimizerLike] = (),
    copies: Iterable[Copy] = (),
) -> Structure:
    """Takes the units that a plan does not keep out of a network, physically and in place.

    Parameters stay the same objects, with their dtype, device, memory format, ``requires_grad`` and hooks; so optimizers,
    schedulers and tied weights keep working. Gradients of the whole model are dropped. Everything is computed before
    anything is assigned: after an error, model, graph, optimizers and copies are as they were. Not touched: what reads
    shapes outside of the model (a DistributedDataParallel wrapper must be rebuilt, a compiled model is compiled anew).

    Args:
        model: The network that the graph was traced from.
        graph: What `trace_channels` returned; it is brought up to date, so that the next plan needs no new trace.
        plan: Group name to a bool vector over the units now present (True = keep); groups it lacks are kept whole.
        optimizers: torch optimizers whose state goes with the parameters.
        copies: What has the model's shape and is cut alike: other modules (an average of the weights), or dicts of
            tensors by parameter name (initial weights).

    Returns:
        The new structure of the model.

    Raises:
        ValueError: The plan does not fit the graph or would empty a removed group, the graph does not fit the model or
            a copy, or an optimizer's state cannot be cut.
    """
    # Tensors made under inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        optimizers, copies = list(optimizers), list(copies)
        decision = decide(graph, plan)
        table = TensorTable(model)
        dead = dead_groups(table.modules, graph, decision)
        if dead:
            decision = decide(graph, plan, dead=dead)
        after = graph.copy().updated(*renumbered(graph, decision))
        cuts = _cuts(decision)
        tables = [table, *(TensorTable(copy) for copy in copies if isinstance(copy, nn.Module))]
        commits: list[Commit] = []
        for network in tables:
            commits += _cut_network(network, graph, decision, cuts, after)
        for tensors in copies:
            if not isinstance(tensors, nn.Module):
                commits += _cut_dict(tensors, table, cuts, graph)
        by_parameter = {table[name].tensor: ops for name, ops in cuts.items() if table[name].is_parameter}
        commits += cut_state(optimizers, by_parameter)
        for commit in commits:
            commit()
        if any(group.size == 0 for group in after.groups):
            drop_empty_parameters(optimizers)
        for entry in (entry for network in tables for entry in network.values() if entry.is_parameter):
            entry.tensor.grad = None
        graph.updated(after.groups, after.shapes, after.layers)
        return structure_from(table)


def _cuts(decision: Decision) -> dict[str, list[Cut]]:
    cuts: dict[str, list[Cut]] = {}
    known: dict[int, Tensor] = {}  # a layer and its norm share their mask
    for (tensor, dim), mask in decision.positions.items():
        if id(mask) not in known:
            known[id(mask)] = torch.from_numpy(mask.nonzero()[0])
        if len(known[id(mask)]) < len(mask):
            cuts.setdefault(tensor, []).append(Cut(dim, known[id(mask)]))
    return cuts


def _cut_network(
    table: TensorTable,
    graph: ChannelGraph,
    decision: Decision,
    cuts: Mapping[str, list[Cut]],
    after: ChannelGraph,
) -> list[Commit]:
    """Computes the cut of one network and returns what carries it out."""
    commits: list[Commit] = []
    modules = table.modules
    for name, ops in cuts.items():
        _check_fits(name, table[name].tensor if name in table else None, graph)
        entry, value = table[name], cut_tensor(table[name].tensor, ops)
        if not entry.persistent:
            # No state dict will bring its values back: the structure must.
            for module, leaf in entry.places:
                commits.append(_remembering_put(module, leaf, value))
        else:
            commits.append(lambda entry=entry, value=value: entry.put(value))  # type: ignore[misc]
    all_local = local_shapes(table, {name: after.shapes[name] for name in cuts})
    for module_name, local in all_local.items():
        module = modules[module_name]
        values = follow_shapes(module, local)
        kept = decision.channels.get(module_name)
        if isinstance(module, _ConvNd) and module.groups > 1 and not module.transposed and kept is not None:
            values["groups"] = conv_groups(module.groups, torch.from_numpy(kept))
            values["in_channels"] = local.get("weight", (0, module.in_channels))[1] * values["groups"]
        commits += [_setting(module, name, value, remember=False) for name, value in values.items()]
    for module_name, patches in after.patched_attributes(after.groups).items():
        module = modules[module_name]
        if module_name in after.layers and after.layers[module_name].num_filters == 0:
            continue  # An emptied layer: no number is left to count, and 0 groups would be refused.
        known = follow_shapes(module, all_local.get(module_name, {}))
        for name, number in patches.items():
            commits.append(_setting(module, name, _filled(module, name, number), remember=name not in known))
    for old in (group for group in graph.groups if group.expansion is not None):
        commits.append(_expanding(modules, old, decision))
        if old.expansion.gathers:  # type: ignore[union-attr]
            commits.append(_gathering(modules, old, decision))
    if any(group.size == 0 for group in after.groups):
        commits += [lambda module=module: follow_emptiness(module) for module in modules.values()]  # type: ignore[misc]
    return commits


def _check_fits(name: str, tensor: Tensor | None, graph: ChannelGraph) -> None:
    found = None if tensor is None else tuple(tensor.shape)
    if found != tuple(graph.shapes[name]):
        raise ValueError(
            f"The graph says that tensor '{name}' has shape {tuple(graph.shapes[name])}, the network has {found}: "
            "pass the network that was traced, or a copy of it, in its present shape, or trace it again."
        )


def _remembering_put(module: nn.Module, leaf: str, value: Tensor) -> Commit:
    return lambda: set_attribute(module, leaf, value, remember=True)


def _setting(module: nn.Module, name: str, value: Any, *, remember: bool) -> Commit:
    return lambda: set_attribute(module, name, value, remember=remember)


def _filled(module: nn.Module, name: str, value: Any) -> Any:
    """A list of which only some places are patched, with the others as they are."""
    if not isinstance(value, list):
        return value
    present = list(getattr(module, name))
    return [old if new is None else new for old, new in zip_longest(present, value)]


def _expanding(modules: Mapping[str, nn.Module], group: ChannelGroup, decision: Decision) -> Commit:
    """The new expansion of an "expand" group; its module's outputs are the filters of the group's first layer."""
    assert group.expansion is not None
    expansion = group.expansion
    module = modules[expansion.module]
    present = expansion_of(module)
    index = np.arange(expansion.width) if present is None else np.asarray(present["index"])
    mask = decision.channels.get(group.layers[0].layer)
    if mask is not None:
        if len(mask) != len(index):
            raise ValueError(
                f"Group '{group.name}': '{expansion.module}' puts out {len(index)} channels, its layer has {len(mask)}: "
                "the graph does not fit the network, trace it again."
            )
        index = index[mask]
    return lambda: set_expansion(module, (expansion.dim, expansion.width, index.tolist()))


def _gathering(modules: Mapping[str, nn.Module], group: ChannelGroup, decision: Decision) -> Commit:
    """The new gather of an "expand" group's grouped convolution: the channels of the groups that it still has."""
    name = group.layers[0].layer
    module, kept = modules[name], decision.channels.get(name)
    assert isinstance(module, _ConvNd)
    present = gather_of(module)
    width = module.in_channels if present is None else present["width"]
    index = np.arange(width) if present is None else np.asarray(present["index"])
    if kept is not None and len(kept):
        groups = kept.reshape(module.groups, -1).any(1)
        index = index[np.repeat(groups, len(index) // module.groups)]
    assert group.expansion is not None
    dim = group.expansion.dim
    return lambda: set_gather(module, (dim, width, index.tolist()))


def _cut_dict(
    tensors: MutableMapping[str, Tensor], table: TensorTable, cuts: Mapping[str, list[Cut]], graph: ChannelGraph
) -> list[Commit]:
    """The cut of a dict of tensors by name; names that the network does not have are left alone."""
    commits: list[Commit] = []
    for alias, tensor in tensors.items():
        name = table.aliases.get(alias, alias)
        if name in cuts:
            _check_fits(name, tensor, graph)
            value = cut_tensor(tensor, cuts[name])
            commits.append(lambda alias=alias, value=value: tensors.__setitem__(alias, value))  # type: ignore[misc]
    return commits

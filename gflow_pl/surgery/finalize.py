"""A copy of a pruned network for deployment: plain modules instead of hooks and replaced forwards."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from gflow_pl.surgery.emptied import has_replaced_forward
from gflow_pl.surgery.expansion import expansion_of, gather_input, gather_of, scatter_output, set_expansion, set_gather
from gflow_pl.surgery.placement_guard import remove_guards, restore_all
from gflow_pl.surgery.placement_modules import EmptyLayer, Gather, Placed, PlacedCall, PlacedTranspose, Scatter

__all__ = ["finalize"]


def finalize(model: nn.Module) -> nn.Module:
    """Return a copy of a pruned network that needs no hooks, for folding, quantization, scripting and export.

    An expanded layer or norm becomes a container with the children ``gather``, ``layer`` and ``scatter``. The copy
    computes what the pruned network computes, bit by bit. Reading ``norm.weight`` of a container goes on working.
    Other modules, and hooks of your own, are copied as they are.

    In the copy's state dict, ``bn1.weight`` of an expanded norm is named ``bn1.layer.weight``, and
    ``bn1.scatter.positions`` is new. A layer without filters has no tensors. To load such a state dict, build the
    network, give it the shape with `apply_structure`, finalize it, and call ``load_state_dict``. Checkpoints of the
    pruned network itself do not change. The copy cannot be pruned further: prune the network that it was made of.

    Args:
        model: A pruned network; it is not changed. A network without expansions is only copied.

    Returns:
        The copy, on the same device.

    Example:
        >>> import torch, gflow_pl
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> len(gflow_pl.finalize(net))
        2
    """
    model = copy.deepcopy(model)
    plain: dict[int, nn.Module] = {}  # by identity: a module with several names is replaced by one container
    kept = list(model.modules())  # alive, so that no identity is reused
    restore_all(kept)
    remove_guards(kept)
    for module in kept:
        replacement = _plain_form(module)
        if replacement is not module:
            plain[id(module)] = replacement
    # A module's parts may have plain forms as well: its replacement refers to the same children as the module.
    for parent in [*kept, *(m for container in plain.values() for m in container.modules() if m is not container)]:
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in plain:
                parent._modules[name] = plain[id(child)]
    return plain.get(id(model), model)


def _plain_form(module: nn.Module) -> nn.Module:
    """Return the module itself, or the container or layer that replaces it."""
    expansion, gather = expansion_of(module), gather_of(module)
    is_empty = has_replaced_forward(module)
    if expansion is None and gather is None and not is_empty:
        return module
    # A new object with the same tensors: where a network refers to the module in another way than as a submodule (in
    # a list, for instance), the module with its hooks goes on computing the same.
    before, layer = _without_placement(module)
    if is_empty:
        layer = _empty_form(module)
    if expansion is None and gather is None:
        return layer
    scatter = None if expansion is None else Scatter(**_placement(module, "_gflow_index", expansion))
    select = None
    if gather is not None and gather["index"]:
        select = Gather(**_placement(module, "_input_gflow_index", gather))
    container = _container_type(module)(layer, select, scatter)
    container.train(module.training)
    for hooks, flags, moved in before:
        getattr(container, hooks).update(moved)
        for flag in flags:
            chosen = getattr(module, flag)
            getattr(container, flag).update({key: chosen[key] for key in moved if key in chosen})
    return container


def _placement(module: nn.Module, name: str, placement: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `Scatter` or `Gather`."""
    device = module._buffers[name].device  # type: ignore[union-attr]
    positions = torch.tensor(placement["index"], dtype=torch.int64, device=device)
    return {"dim": placement["dim"], "width": placement["width"], "positions": positions}


_Hooks = tuple[str, tuple[str, ...], dict[int, Any]]


def _without_placement(module: nn.Module) -> tuple[list[_Hooks], nn.Module]:
    """Return a copy that shares the module's tensors, without our hooks, and the hooks that belong to its container.

    Hooks that see all channels belong to the container: pre-hooks before the gather, and hooks behind the scatter.
    """
    layer = module.__class__.__new__(module.__class__)
    layer.__dict__ = module.__dict__.copy()
    for name, value in list(layer.__dict__.items()):
        if isinstance(value, (dict, OrderedDict)) and name.startswith("_"):
            layer.__dict__[name] = copy.copy(value)
    layer.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    # Hooks of the user on the outer side of our own.
    moved: list[_Hooks] = []
    after = _split(module._forward_hooks, scatter_output)[1]
    moved.append(("_forward_hooks", ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"), after))
    outer = _split(module._forward_pre_hooks, gather_input)[0]
    moved.append(("_forward_pre_hooks", ("_forward_pre_hooks_with_kwargs",), outer))
    for name, _, hooks in moved:
        for key in hooks:
            getattr(layer, name).pop(key)
    set_expansion(layer, None)
    set_gather(layer, None)
    return moved, layer


def _split(hooks: Mapping[int, Any], ours: object) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the hooks before and those behind our own; two empty dicts if ours is not among them."""
    keys = list(hooks)
    places = [i for i, key in enumerate(keys) if hooks[key] is ours]
    if not places:
        return {}, {}
    return {k: hooks[k] for k in keys[: places[0]]}, {k: hooks[k] for k in keys[places[0] + 1 :]}


def _container_type(module: nn.Module) -> type[Placed] | type[PlacedCall] | type[PlacedTranspose]:
    """Return the container for a module, by the arguments of its forward."""
    if isinstance(module, _ConvTransposeNd):
        return PlacedTranspose
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    one = len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    return Placed if one else PlacedCall


def _empty_form(module: nn.Module) -> nn.Module:
    """Return the plain form of a module whose forward is replaced because it has no output channels."""
    forward = module.__dict__["forward"]
    if forward.func.__name__ == "_pass_on":
        return nn.Identity()
    return EmptyLayer(**forward.keywords)

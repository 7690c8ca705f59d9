"""Layers that lost all of their filters: they run no more, and a zeros tensor takes the place of what they computed.

No operator accepts a convolution without filters, so the module gets another ``forward``: a function of plain numbers,
as an attribute of the instance, which is copied, pickled and exported with it. It returns zeros with one channel, as
pooling and resizing refuse none; the expansion behind the last module of the branch makes them as wide as the stream.
What only such layers read is emptied with them, where the graph leaves no doubt that nobody else reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gflow_pl.common.optimizers import OptimizerLike, unwrap_optimizer
from gflow_pl.surgery.plan_masks import Decision
from gflow_pl.values import ChannelGraph, ChannelGroup, Slice

__all__ = ["dead_groups", "drop_empty_parameters", "follow_emptiness", "output_width"]

_FROZEN = "_gflow_was_trained"
_WIDTHS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (_ConvNd, "out_channels"),
    (nn.Linear, "out_features"),
    (_NormBase, "num_features"),
    (nn.GroupNorm, "num_channels"),
    ((nn.LayerNorm, nn.RMSNorm), "normalized_shape"),
    (nn.PReLU, "num_parameters"),
)


def follow_emptiness(module: nn.Module, *, emptied: bool = True) -> None:
    """Makes a module that has no output channels run no more and train no more, and one that has them run again.

    Args:
        module: Any module.
        emptied: Whether its network has an emptied branch; if not, a layer without outputs was built like that.
    """
    if emptied and output_width(module) == 0:
        module.__dict__["forward"] = _stand_in(module)
        trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if trained:
            module.__dict__[_FROZEN] = trained
        for name in trained:
            module.get_parameter(name).requires_grad_(False)
    elif runs_no_more(module):
        del module.__dict__["forward"]
        for name in module.__dict__.pop(_FROZEN, []):
            module.get_parameter(name).requires_grad_(True)


def runs_no_more(module: nn.Module) -> bool:
    """Whether a stand-in takes the place of the module's own ``forward``."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func in _STAND_INS


def output_width(module: nn.Module) -> int | None:
    """Output channels of a layer or norm, by its own numbers; None for any other module."""
    for kinds, name in _WIDTHS:
        if isinstance(module, kinds):
            width = getattr(module, name)
            return width[-1] if isinstance(width, tuple) else width
    return None


def _stand_in(module: nn.Module) -> Any:
    if isinstance(module, nn.Linear):
        return partial(_no_rows)
    if not isinstance(module, _ConvNd):
        return partial(_pass_on)
    transposed = isinstance(module, _ConvTransposeNd)
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    pads = [2 * pad for pad in module.padding if not isinstance(pad, str)]
    if isinstance(module.padding, str):
        pads = spans if module.padding == "same" else [0] * len(spans)
    gains = tuple(pad - span for pad, span in zip(pads, spans, strict=True))
    if transposed:
        gains = tuple(extra - gain for extra, gain in zip(module.output_padding, gains, strict=True))
    ones = (1,) * len(gains)
    up, down = (tuple(module.stride), ones) if transposed else (ones, tuple(module.stride))
    return partial(_no_maps, up=up, gain=gains, down=down)


# Their arguments have the names that the layers' have: some forwards call by name.


def _no_maps(
    input: Tensor,
    output_size: Sequence[int] | None = None,
    *,
    up: tuple[int, ...],
    gain: tuple[int, ...],
    down: tuple[int, ...],
) -> Tensor:
    """What a convolution without filters puts out, one channel of zeros for none."""
    first = input.ndim - len(gain)
    lengths = input.shape[first:]
    sizes = [((n - 1) * u + g) // d + 1 for n, u, g, d in zip(lengths, up, gain, down, strict=True)]
    sizes = sizes if output_size is None else list(output_size)[-len(gain) :]
    return _zeros(input, [*input.shape[: first - 1], 1, *sizes])


def _no_rows(input: Tensor) -> Tensor:
    """What a linear layer without rows puts out, one column of zeros for none."""
    return _zeros(input, [*input.shape[:-1], 1])


def _pass_on(input: Tensor) -> Tensor:
    return input


_STAND_INS = (_no_maps, _no_rows, _pass_on)


def _zeros(x: Tensor, shape: list[int]) -> Tensor:
    """Zeros in the dtype that the layer would have given."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    # Not one zero expanded: an in-place activation may follow.
    return x.new_zeros(shape, dtype=dtype)


def dead_groups(modules: Mapping[str, nn.Module], graph: ChannelGraph, decision: Decision) -> set[str]:
    """Removed groups whose units nobody reads any more, because all that reads them is emptied or dead itself.

    Left alone, which costs time but no exactness, is a group where a stand-in of one channel might not do (a unit is more
    than one channel of its layer; an attribute of another module counts the units; a norm has channels of other groups,
    too), or where a tensor of an unknown module goes along.
    """
    emptied = {name for name, layer in graph.layers.items() if layer.num_filters == 0}
    emptied |= {name for name, kept in decision.channels.items() if not kept.any()}
    if not emptied:
        return set()
    counted = {
        group
        for attribute, rule in graph.patches.items()
        if output_width(modules[attribute.module]) is None
        for group in rule.per_unit
    }
    candidates = {
        group.name: readers
        for group in graph.groups
        if group.kind == "remove" and decision.units[group.name].any() and group.name not in counted
        if all(layer.index.shape[1] == 1 for layer in group.layers if layer.votes)
        if (readers := _readers(group, modules))
    }
    # Optimists first: groups may read each other (a squeeze and its gate), so all are dead until one proves alive.
    while True:
        shared = _not_alone(candidates, graph, decision, modules)
        candidates = {n: r for n, r in candidates.items() if n not in shared}
        without = emptied | _layers_without(set(candidates), graph, decision)
        reached = emptied | set[str]()
        still: dict[str, set[str]] = {}
        while more := {n: r for n, r in candidates.items() if n not in still and r <= without and r & reached}:
            still |= more
            reached |= {layer.layer for group in graph.groups if group.name in more for layer in group.layers}
        if still.keys() == candidates.keys() and not _not_alone(still, graph, decision, modules):
            return set(still)
        candidates = still


def _layers_without(dead: set[str], graph: ChannelGraph, decision: Decision) -> set[str]:
    """Layers that have no filter left if these groups are dead."""
    left: dict[str, np.ndarray] = {}
    for group in graph.groups:
        for part in group.layers if group.name in dead else ():
            if part.layer in graph.layers:
                whole = decision.channels.get(part.layer, np.ones(graph.layers[part.layer].num_filters, dtype=bool))
                left.setdefault(part.layer, whole.copy())[part.index] = False
    return {name for name, mask in left.items() if not mask.any()}


def _not_alone(
    dead: Collection[str], graph: ChannelGraph, decision: Decision, modules: Mapping[str, nn.Module]
) -> set[str]:
    """Dead groups that share a module, but for those that read them, with channels that stay."""
    left: dict[tuple[str, int], np.ndarray] = {}
    own: dict[str, list[tuple[str, int]]] = {}
    for group in graph.groups:
        for part in group.slices if group.name in dead else ():
            if not _is_read(part, modules):
                key = (part.tensor, part.dim)
                whole = decision.positions.get(key, np.ones(graph.shapes[part.tensor][part.dim], dtype=bool))
                left.setdefault(key, whole.copy())[part.index] = False
                own.setdefault(group.name, []).append(key)
    return {name for name, keys in own.items() if any(left[key].any() for key in keys)}


def _is_read(part: Slice, modules: Mapping[str, nn.Module]) -> bool:
    """Whether these are inputs of a layer."""
    name, _, leaf = part.tensor.rpartition(".")
    module = modules.get(name)
    return (
        isinstance(module, (_ConvNd, nn.Linear))
        and leaf == "weight"
        and part.dim != int(isinstance(module, _ConvTransposeNd))
    )


def _readers(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> set[str]:
    """Layers that read the group's units; none if anything is there that is not surely understood."""
    makers, readers = {layer.layer for layer in group.layers}, set()
    for part in group.slices:
        name = part.tensor.rpartition(".")[0]
        module = modules.get(name)
        if module is None or output_width(module) is None:
            return set()
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        if _is_read(part, modules):
            readers.add(name)
        elif name not in makers:
            return set()
    return readers


def drop_empty_parameters(optimizers: Iterable[OptimizerLike]) -> None:
    """Takes parameters that have no elements left out of optimizers; their groups stay.

    `rewrite` does it to the optimizers that it is given. An optimizer that is built for a network which was emptied before
    needs it ahead of loading a saved state, whose parameters are counted without the empty ones.

    Args:
        optimizers: torch optimizers, or wrappers that hold one as ``.optimizer``.
    """
    for optimizer in map(unwrap_optimizer, optimizers):
        for group in optimizer.param_groups:
            for parameter in [p for p in group["params"] if p.numel() == 0]:
                optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if p.numel() > 0]

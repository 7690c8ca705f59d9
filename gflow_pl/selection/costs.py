"""Parameters and multiply-accumulates of a network after a plan, computed from the graph alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from gflow_pl.common.errors import SettingsError
from gflow_pl.values import ChannelGraph

__all__ = ["CostModel", "cost_after"]


def cost_after(graph: ChannelGraph, plan: Mapping[str, Tensor] | None = None) -> tuple[int, int]:
    """Count the parameters and multiply-accumulates that remain after a plan, without rewriting the network.

    Parameters are the elements of all parameters, in groups or not; buffers are not counted. Multiply-accumulates are
    those of conv, transposed conv and linear layers for one example of the traced size. One fused multiply-add counts
    as one; norms, activations, pooling and bias are not counted.

    Args:
        graph: The traced network.
        plan: Group name to a bool vector over the units now present (True = keep). A group that is missing is kept
            whole. None counts the network as it is.

    Returns:
        ``(parameters, macs)``.

    Raises:
        SettingsError: The plan does not fit a group of the graph.
    """
    return CostModel(graph).after({name: np.asarray(keep, dtype=bool) for name, keep in (plan or {}).items()})


class CostModel:
    """Parameters and multiply-accumulates of a graph as a function of the units that stay.

    The tables are built once, so that a search can evaluate many plans on one graph.

    Args:
        graph: The traced network.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._shapes = graph.shapes
        self._uses = graph.uses
        self._buffers = graph.buffers
        self._sizes = {group.name: group.size for group in graph.groups}
        self._follows = {group.name: group.follows for group in graph.groups if group.follows is not None}
        self._slices: dict[tuple[str, int], list[tuple[str, np.ndarray]]] = {}
        for group in graph.groups:
            for part in group.slices:
                if self._is_counted(part.tensor):
                    self._slices.setdefault((part.tensor, part.dim), []).append((group.name, part.index))

    def _is_counted(self, tensor: str) -> bool:
        """Return whether a tensor adds to one of the two counts; a buffer does only if it is the weight of a layer."""
        return tensor in self._shapes and (tensor not in self._buffers or tensor in self._uses)

    def after(self, keep: Mapping[str, np.ndarray]) -> tuple[int, int]:
        """Return ``(parameters, macs)`` of the network that keeps some of its units.

        Args:
            keep: Group name to (units,) bool, True = keep. A group that is missing is kept whole.

        Raises:
            SettingsError: An entry does not fit a group of the graph.
        """
        for name, bits in keep.items():
            if bits.shape != (self._sizes.get(name),):
                expected = self._sizes.get(name, "no such group")
                raise SettingsError(
                    f"The plan of group '{name}' has shape {bits.shape}, the graph has {expected} units."
                )
        keep = {**{name: keep[leader] for name, leader in self._follows.items() if leader in keep}, **keep}
        # Size of every tensor dimension after the plan.
        shapes = {name: list(shape) for name, shape in self._shapes.items() if self._is_counted(name)}
        for (tensor, dim), parts in self._slices.items():
            # A mask instead of a sum of counts: a position that two groups hold is removed once, as in surgery.
            stays = np.ones(self._shapes[tensor][dim], dtype=bool)
            for group, index in parts:
                if group in keep:
                    stays[index[~keep[group]]] = False
            shapes[tensor][dim] = int(stays.sum())
        # Both counts follow from the number of elements.
        numel = {name: math.prod(shape) for name, shape in shapes.items()}
        parameters = sum(count for name, count in numel.items() if name not in self._buffers)
        return parameters, sum(uses * numel[name] for name, uses in self._uses.items() if name in numel)

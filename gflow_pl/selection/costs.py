"""What a network costs after a plan, from names and integers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from gflow_pl.values import ChannelGraph

__all__ = ["cost_after"]


def cost_after(graph: ChannelGraph, plan: Mapping[str, Tensor] | None = None) -> tuple[int, int]:
    """Parameters and multiply-accumulates that are left after a plan; without one, those of the network as it is.

    Parameters are the elements of all parameters, in groups or not (buffers are not counted). Multiply-accumulates are
    those of conv, transposed conv and linear layers for one example of the traced size: one fused multiply-add counts
    once; norms, activations, pooling and bias are not counted.

    Args:
        graph: The traced network.
        plan: Group name to a bool vector over its units now present (True = keep); groups it lacks are kept whole.

    Returns:
        ``(parameters, macs)``.

    Raises:
        ValueError: The plan does not fit a group of the graph.
    """
    return CostModel(graph).after({name: np.asarray(keep, dtype=bool) for name, keep in (plan or {}).items()})


class CostModel:
    """Parameters and multiply-accumulates of a graph as a function of who stays, for many plans in a row."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._shapes = graph.shapes
        self._uses = graph.uses
        self._buffers = graph.buffers
        self._sizes = {group.name: group.size for group in graph.groups}
        self._slices: dict[tuple[str, int], list[tuple[str, np.ndarray]]] = {}
        for group in graph.groups:
            for part in group.slices:
                if self._matters(part.tensor):
                    self._slices.setdefault((part.tensor, part.dim), []).append((group.name, part.index))

    def _matters(self, tensor: str) -> bool:
        return tensor in self._shapes and (tensor not in self._buffers or tensor in self._uses)

    def after(self, keep: Mapping[str, np.ndarray]) -> tuple[int, int]:
        """``(parameters, macs)`` with the units that `keep` says; groups that it lacks are whole."""
        for name, bits in keep.items():
            if bits.shape != (self._sizes.get(name),):
                expected = self._sizes.get(name, "no such group")
                raise ValueError(f"The plan of group '{name}' has shape {bits.shape}, the graph has {expected} units.")
        shapes = {name: list(shape) for name, shape in self._shapes.items() if self._matters(name)}
        for (tensor, dim), parts in self._slices.items():
            # A mask, not a sum of counts: a position that is listed twice goes once, as in surgery.
            left = np.ones(self._shapes[tensor][dim], dtype=bool)
            for group, index in parts:
                if group in keep:
                    left[index[~keep[group]]] = False
            shapes[tensor][dim] = int(left.sum())
        numel = {name: math.prod(shape) for name, shape in shapes.items()}
        parameters = sum(count for name, count in numel.items() if name not in self._buffers)
        return parameters, sum(uses * numel[name] for name, uses in self._uses.items() if name in numel)

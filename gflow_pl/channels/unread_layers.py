"""Layers that no recorded call runs, and channels that such a layer could read."""

from __future__ import annotations

import math

from torch import nn

from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.record import Record

__all__ = ["freeze_for_unread"]


def freeze_for_unread(record: Record, runner: ForwardRunner) -> None:
    """Freeze the channels of the modules' outputs that have the width of a layer that nothing has run.

    Such a layer may read a feature of the network elsewhere: in a hook of the training, or in a probe. Its width is all
    that is known. A module whose tensors an operator has read is not one of them.
    """
    for name, reason in runner.unread.items():
        module = runner.modules.get(name)
        own = [] if module is None else [f"{name}.{leaf}" for leaf in module._parameters]
        if module is None or any(record.constraints.has_tensor(tensor) for tensor in own):
            continue
        widths = _widths(module)
        for shape, labels in record.module_outputs:
            for dim, vector in enumerate(labels):
                if vector is not None and not widths.isdisjoint((shape[dim], math.prod(shape[dim:]))):
                    record.constraints.freeze(vector, reason)


def _widths(module: nn.Module) -> set[int]:
    """Return the numbers of channels that a module may read, from the shapes of its own parameters."""
    shapes = [tuple(p.shape) for p in module._parameters.values() if p is not None]
    weights = [shape for shape in shapes if len(shape) > 1]
    if not weights:
        return {shape[0] for shape in shapes if shape}
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):
        return {shape[0] for shape in weights}
    return {shape[1] * groups for shape in weights} | {shape[-1] for shape in weights if len(shape) == 3}

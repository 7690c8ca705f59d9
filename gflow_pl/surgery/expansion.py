"""Expansion: a layer computes the filters it kept, and downstream sees them among zeros of the old width.

A grouped convolution whose groups go, while what it reads keeps its width, picks the channels of the others: a gather.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gflow_pl.values.expansion_names import EXPANSION, GATHER, PlacementNames

__all__ = ["expansion_of", "gather_input", "gather_of", "scatter_output", "set_expansion", "set_gather"]

Placed = tuple[int, int, Sequence[int]]


def scatter_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """The output's channels at their old places among zeros; a forward hook.

    A module-level function, so that it is pickled by name, and all it needs lies on the module: the index as a
    non-persistent buffer, which follows ``.to()`` and is in no state dict, dim and width as plain ints.
    """
    dim, width = module._gflow_dim, module._gflow_width
    shape = list(output.shape)
    shape[dim] = width  # type: ignore[call-overload]
    zeros = output.new_zeros(shape)
    channels_last = torch.channels_last
    if output.ndim == 4 and output.is_contiguous(memory_format=channels_last) and not output.is_contiguous():
        zeros = zeros.to(memory_format=channels_last)
    if module._gflow_index.numel() == 0:  # type: ignore[operator]
        return zeros
    return zeros.index_copy_(dim, module._gflow_index, output)  # type: ignore[arg-type]


def gather_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The channels that a grouped convolution still reads; a forward pre-hook, made like `scatter_output`."""
    if module._input_gflow_index.numel() == 0:  # type: ignore[operator]
        return None  # Its stand-in looks at nothing but the size.
    return args[0].index_select(module._input_gflow_dim, module._input_gflow_index), *args[1:]  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Side:
    """Where a module keeps what its hook reads, and where the hook is kept."""

    names: PlacementNames
    hook: Callable[..., Any]
    hooks: str
    register: str

    def read(self, module: nn.Module) -> dict[str, Any] | None:
        if self.names.positions not in module._buffers:  # scripted modules answer nothing else
            return None
        index = module._buffers[self.names.positions]
        assert index is not None
        dim, width = (getattr(module, name) for name in (self.names.dim, self.names.width))
        return {"dim": dim, "width": width, "index": index.tolist()}

    def put(self, module: nn.Module, placed: Placed | None) -> None:
        if placed is None or len(placed[2]) == placed[1]:
            self._take_away(module)
            return
        dim, width, index = placed
        name = self.names.positions
        present = module._buffers.get(name)
        device = present.device if present is not None else _device_of(module)
        if present is None:
            module.register_buffer(name, None, persistent=False)
        if present is None or present.tolist() != list(index):
            module._buffers[name] = torch.tensor(list(index), dtype=torch.int64, device=device)
        for number, value in zip((self.names.dim, self.names.width), (dim, width), strict=True):
            setattr(module, number, value)
        if not any(hook is self.hook for hook in getattr(module, self.hooks).values()):
            getattr(module, self.register)(self.hook)

    def _take_away(self, module: nn.Module) -> None:
        if self.names.positions not in module._buffers:
            return
        module._buffers.pop(self.names.positions, None)
        module._non_persistent_buffers_set.discard(self.names.positions)
        for name in (self.names.dim, self.names.width):
            module.__dict__.pop(name, None)
        hooks = getattr(module, self.hooks)
        for key, hook in list(hooks.items()):
            if hook is self.hook:
                del hooks[key]


_SCATTER = _Side(EXPANSION, scatter_output, "_forward_hooks", "register_forward_hook")
_GATHER = _Side(GATHER, gather_input, "_forward_pre_hooks", "register_forward_pre_hook")


def expansion_of(module: nn.Module) -> dict[str, Any] | None:
    """``{"dim", "width", "index"}`` of the module's expansion, None if it has none."""
    return _SCATTER.read(module)


def gather_of(module: nn.Module) -> dict[str, Any] | None:
    """``{"dim", "width", "index"}`` of what the module picks of its input, None if it reads all."""
    return _GATHER.read(module)


def set_expansion(module: nn.Module, expansion: Placed | None) -> None:
    """Gives the module this expansion and no other.

    Args:
        module: The module whose output is scattered.
        expansion: ``(dim, width, index)``; None, or an index of the full width, takes the expansion away.
    """
    _SCATTER.put(module, expansion)


def set_gather(module: nn.Module, gather: Placed | None) -> None:
    """Gives the module this gather and no other.

    Args:
        module: The grouped convolution whose input is picked from.
        gather: ``(dim, width, index)``; None, or an index of the full width, takes the gather away.
    """
    _GATHER.put(module, gather)


def _device_of(module: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)

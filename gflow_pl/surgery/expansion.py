"""Hooks of expanded modules: scatter the kept outputs into zeros of the full width, or gather the remaining inputs.

An expanded layer computes only the filters it kept. Its outputs are scattered to their old positions, so nothing
downstream changes. If groups of a grouped convolution are removed while its input keeps its width, the inputs of the
remaining groups are gathered.

`scatter_output` and `gather_input` are pickled by name with the module they are registered on: they must stay in this
file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gflow_pl.values.expansion_names import EXPANSION, GATHER, PlacementNames

__all__ = ["Placement", "expansion_of", "gather_input", "gather_of", "scatter_output", "set_expansion", "set_gather"]


class Placement(NamedTuple):
    """Positions of some channels among all channels of the full width.

    Attributes:
        dim: Channel dim.
        width: Full width.
        positions: Position of each channel at the full width.
    """

    dim: int
    width: int
    positions: Sequence[int]


def scatter_output(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """Scatter the output's channels to their positions among zeros of the full width; a forward hook.

    All settings are on the module itself: the positions as a non-persistent buffer, which follows ``.to()`` and is in
    no state dict, and dim and width as ints.

    Args:
        module: The module that the hook is registered on.
        args: Inputs of the module; not used.
        output: Output of the module, with the kept channels only.

    Returns:
        Output with all channels, in the memory format of `output`.
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
    """Gather the channels that a grouped convolution still reads from its first input; a forward pre-hook.

    Its settings are stored as for `scatter_output`.

    Args:
        module: The convolution that the hook is registered on.
        args: Inputs of the convolution.

    Returns:
        Inputs with the gathered channels; None, which leaves them as they are, if the convolution has no filters left.
    """
    if module._input_gflow_index.numel() == 0:  # type: ignore[operator]
        return None  # The forward of an emptied layer reads only the shape of its input.
    return args[0].index_select(module._input_gflow_dim, module._input_gflow_index), *args[1:]  # type: ignore[arg-type]


@dataclass(frozen=True)
class _PlacementHook:
    """One of the two hooks, and where a module stores it and its settings.

    Attributes:
        names: Names of the settings on the module.
        hook: The hook function.
        hooks: Name of the module's dict of hooks of this type.
        register: Name of the method that registers a hook of this type.
    """

    names: PlacementNames
    hook: Callable[..., Any]
    hooks: str
    register: str

    def read(self, module: nn.Module) -> dict[str, Any] | None:
        """Return the module's placement as ``{"dim", "width", "index"}``, or None if it has none."""
        if self.names.positions not in module._buffers:  # not hasattr: scripted modules support only this
            return None
        positions = module._buffers[self.names.positions]
        assert positions is not None
        dim, width = getattr(module, self.names.dim), getattr(module, self.names.width)
        return {"dim": dim, "width": width, "index": positions.tolist()}

    def set(self, module: nn.Module, placement: Placement | None) -> None:
        """Give a module this placement and register the hook; None, or one with all positions, removes both."""
        if placement is None or len(placement.positions) == placement.width:
            self._remove(module)
            return
        dim, width, positions = placement
        name = self.names.positions
        # The settings. A buffer with the same positions stays the same tensor.
        present = module._buffers.get(name)
        device = present.device if present is not None else _device_of(module)
        if present is None:
            module.register_buffer(name, None, persistent=False)
        if present is None or present.tolist() != list(positions):
            module._buffers[name] = torch.tensor(list(positions), dtype=torch.int64, device=device)
        setattr(module, self.names.dim, dim)
        setattr(module, self.names.width, width)
        # The hook.
        if not any(hook is self.hook for hook in getattr(module, self.hooks).values()):
            getattr(module, self.register)(self.hook)

    def _remove(self, module: nn.Module) -> None:
        """Remove the settings and the hook from a module, if it has them."""
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


_SCATTER = _PlacementHook(EXPANSION, scatter_output, "_forward_hooks", "register_forward_hook")
_GATHER = _PlacementHook(GATHER, gather_input, "_forward_pre_hooks", "register_forward_pre_hook")


def expansion_of(module: nn.Module) -> dict[str, Any] | None:
    """Return the expansion of a module as ``{"dim", "width", "index"}``, or None if it has none."""
    return _SCATTER.read(module)


def gather_of(module: nn.Module) -> dict[str, Any] | None:
    """Return the gather of a module as ``{"dim", "width", "index"}``, or None if it reads its whole input."""
    return _GATHER.read(module)


def set_expansion(module: nn.Module, expansion: Placement | None) -> None:
    """Replace the expansion of a module.

    Args:
        module: The module whose output is scattered.
        expansion: The new expansion. None, or an expansion with all positions, removes the present one.
    """
    _SCATTER.set(module, expansion)


def set_gather(module: nn.Module, gather: Placement | None) -> None:
    """Replace the gather of a module.

    Args:
        module: The grouped convolution whose input is gathered.
        gather: The new gather. None, or a gather with all positions, removes the present one.
    """
    _GATHER.set(module, gather)


def _device_of(module: nn.Module) -> torch.device | None:
    """Return the device of the module's first tensor, or None if it has no tensors."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)

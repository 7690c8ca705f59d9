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
from typing import Any, NamedTuple, Tuple  # noqa: UP035 (TorchScript reads these annotations)

import torch
from torch import Tensor, nn

from gflow_pl.common.errors import SettingsError
from gflow_pl.surgery.expanded_class import update_class
from gflow_pl.surgery.placement_modules import scatter
from gflow_pl.values.expansion_names import EXPANSION, GATHER, PlacementNames

__all__ = ["Placement", "expansion_of", "gather_input", "gather_of", "scatter_output", "set_expansion", "set_gather"]

_VALUES = "_gflow_values"
"""Attribute of an index tensor: its values as a tuple of ints."""


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


def scatter_output(module: nn.Module, args: Tuple[Tensor], output: Tensor) -> Tensor:  # noqa: UP006
    """Scatter the output's channels to their positions among zeros of the full width; a forward hook.

    All settings are on the module itself: the positions as a non-persistent buffer, which follows ``.to()`` and is in
    no state dict, and dim, width and positions as ints. The annotations are for TorchScript.

    Args:
        module: The module that the hook is registered on.
        args: Inputs of the module; not used.
        output: Output of the module, with the kept channels only.

    Returns:
        Output with all channels, in the memory format of `output`.

    Raises:
        SettingsError: The output has another number of channels, since a tool has replaced the module.
    """
    if not torch.jit.is_scripting():
        positions = _positions(module, EXPANSION, output)
        _check_channels(module, output, positions)
        return scatter(output, positions, module._gflow_dim, module._gflow_width)  # type: ignore[arg-type]
    return scatter(output, module._gflow_index, module._gflow_dim, module._gflow_width)  # type: ignore[arg-type]


def gather_input(module: nn.Module, args: Tuple[Tensor]) -> Tuple[Tensor]:  # noqa: UP006
    """Gather the channels that a grouped convolution still reads from its first input; a forward pre-hook.

    Its settings are stored as for `scatter_output`.

    Args:
        module: The convolution that the hook is registered on.
        args: Inputs of the convolution.

    Returns:
        Inputs with the gathered channels, or as they are if the convolution has no filters left.
    """
    if not torch.jit.is_scripting():
        if module._input_gflow_index.numel() == 0:  # type: ignore[operator]
            return args  # The forward of an emptied layer reads only the shape of its input.
        positions = _positions(module, GATHER, args[0])
        return args[0].index_select(module._input_gflow_dim, positions), *args[1:]  # type: ignore
    return (args[0].index_select(module._input_gflow_dim, module._input_gflow_index),)  # type: ignore[arg-type]


def _positions(module: nn.Module, names: PlacementNames, x: Tensor) -> Tensor:
    """Return the positions on the device of `x`, also if the buffer has lost its values (``to_empty``).

    A buffer with these values carries them as ints. Any other tensor in its place (moved, cloned, batched by vmap) is
    replaced by a new one; nothing is read from the device.
    """
    present = module._buffers[names.positions]
    kept = vars(module).get(names.kept)
    assert present is not None
    if kept is None or torch.compiler.is_exporting() or present.is_meta or getattr(present, _VALUES, None) == kept:
        return present
    if present.numel() != len(kept):  # the trial of a trace
        return present
    fresh = _index_tensor(kept, x.device)
    # `functional_call` under vmap has replaced the buffer for one call.
    if not torch._C._functorch.is_functorch_wrapped_tensor(present):
        module._buffers[names.positions] = fresh
    return fresh


def _check_channels(module: nn.Module, output: Tensor, positions: Tensor) -> None:
    """Raise if an output has another number of channels than there are positions."""
    channels, expected = output.shape[module._gflow_dim], positions.numel()  # type: ignore[index]
    if expected not in (0, channels):
        raise SettingsError(
            f"An expanded {type(module).__name__} returned {channels} channels and should return {expected}: a tool "
            "has replaced it or its layer; call `gflow_pl.finalize(model)` before such a tool."
        )


def _index_tensor(positions: Sequence[int], device: torch.device | None) -> Tensor:
    """Return positions as a tensor that carries its values as ints."""
    index = torch.tensor(list(positions), dtype=torch.int64, device=device)
    vars(index)[_VALUES] = tuple(positions)
    return index


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
        kept = vars(module).get(self.names.kept)
        return {"dim": dim, "width": width, "index": positions.tolist() if kept is None else list(kept)}

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
        if present is None or vars(present).get(_VALUES) != tuple(positions):
            module._buffers[name] = _index_tensor(positions, device)
        setattr(module, self.names.dim, dim)
        setattr(module, self.names.width, width)
        setattr(module, self.names.kept, tuple(positions))
        # The hook.
        if not any(hook is self.hook for hook in getattr(module, self.hooks).values()):
            getattr(module, self.register)(self.hook)
        update_class(module)

    def _remove(self, module: nn.Module) -> None:
        """Remove the settings and the hook from a module, if it has them."""
        if self.names.positions not in module._buffers:
            return
        module._buffers.pop(self.names.positions, None)
        module._non_persistent_buffers_set.discard(self.names.positions)
        for name in (self.names.dim, self.names.width, self.names.kept):
            module.__dict__.pop(name, None)
        hooks = getattr(module, self.hooks)
        for key, hook in list(hooks.items()):
            if hook is self.hook:
                del hooks[key]
        update_class(module)


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

"""Expansion: a layer computes the filters it kept, and downstream sees them among zeros of the old width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gflow_pl.surgery.tensors import INDEX

__all__ = ["expansion_of", "scatter_output", "set_expansion"]

_DIM, _WIDTH = "_gflow_dim", "_gflow_width"


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


def expansion_of(module: nn.Module) -> dict[str, Any] | None:
    """``{"dim", "width", "index"}`` of the module's expansion, None if it has none."""
    if INDEX not in module._buffers:
        return None
    index = module._buffers[INDEX]
    assert index is not None
    return {"dim": getattr(module, _DIM), "width": getattr(module, _WIDTH), "index": index.tolist()}


def set_expansion(module: nn.Module, expansion: tuple[int, int, Sequence[int]] | None) -> None:
    """Gives the module this expansion and no other.

    Args:
        module: The module whose output is scattered.
        expansion: ``(dim, width, index)``; None, or an index of the full width, takes the expansion away.
    """
    if expansion is None or len(expansion[2]) == expansion[1]:
        _take_away(module)
        return
    dim, width, index = expansion
    present = module._buffers.get(INDEX)
    device = present.device if present is not None else _device_of(module)
    if present is None:
        module.register_buffer(INDEX, None, persistent=False)
    if present is None or present.tolist() != list(index):
        module._buffers[INDEX] = torch.tensor(list(index), dtype=torch.int64, device=device)
    setattr(module, _DIM, dim)
    setattr(module, _WIDTH, width)
    if not any(hook is scatter_output for hook in module._forward_hooks.values()):
        module.register_forward_hook(scatter_output)


def _take_away(module: nn.Module) -> None:
    module._buffers.pop(INDEX, None)
    module._non_persistent_buffers_set.discard(INDEX)
    for name in (_DIM, _WIDTH):
        module.__dict__.pop(name, None)
    for key, hook in list(module._forward_hooks.items()):
        if hook is scatter_output:
            del module._forward_hooks[key]


def _device_of(module: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)

"""A guard on the module around expanded layers: it restores expansions that a tool has dropped with the layer.

`convert_sync_batchnorm`, for instance, puts a new norm in the place of an expanded one, without its hooks. The forward
pre-hook `restore_placements` of the module around it restores them before the norm runs. It is pickled by name: it must
stay in this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Tuple  # noqa: UP035 (TorchScript reads these annotations)

import torch
from torch import Tensor, nn

from gflow_pl.common.errors import SettingsError
from gflow_pl.surgery.expansion import Placement, expansion_of, gather_of, set_expansion, set_gather
from gflow_pl.values.expansion_names import EXPANSION, GATHER

__all__ = ["remove_guards", "restore_all", "restore_placements", "update_guards"]

_GUARDED = "_gflow_guarded"
"""Attribute of the guarding module: path of an expanded module to its expansion and its gather, or None."""


def restore_placements(module: nn.Module, args: Tuple[Tensor]) -> None:  # noqa: UP006
    """Restore the expansions and gathers of the layers in a module that have lost them; a forward pre-hook.

    Args:
        module: The module that the hook is registered on.
        args: Inputs of the module; not used.

    Raises:
        SettingsError: An expanded layer is no longer there.
    """
    if not torch.jit.is_scripting():
        _restore(module)


def _restore(module: nn.Module) -> None:
    """Restore the placements that a module guards."""
    for path, (scatter, gather) in module.__dict__.get(_GUARDED, {}).items():
        child: Any = module
        for name in path.split("."):
            child = child._modules.get(name) if child is not None else None
        if child is None:
            raise SettingsError(
                f"The expanded layer '{path}' is missing in {type(module).__name__}: a tool has folded it into another "
                "layer; call `gflow_pl.finalize(model)` before such a tool."
            )
        if scatter is not None and EXPANSION.positions not in child._buffers:
            set_expansion(child, Placement(*scatter))
        if gather is not None and GATHER.positions not in child._buffers:
            set_gather(child, Placement(*gather))


def restore_all(modules: Iterable[nn.Module]) -> None:
    """Restore the placements that any of these modules guards."""
    for module in list(modules):
        _restore(module)


def update_guards(modules: Mapping[str, nn.Module]) -> None:
    """Guard the present placements of a network, and nothing else.

    The guard of a layer is the next module around it that has a forward of its own.

    Args:
        modules: All modules of the network by name, the network itself under "".
    """
    remove_guards(modules.values())
    for name, module in modules.items():
        placements = [_as_tuple(expansion_of(module)), _as_tuple(gather_of(module))]
        if not name or placements == [None, None]:
            continue
        parts = name.split(".")
        depth = len(parts) - 1
        while depth and isinstance(modules[".".join(parts[:depth])], (nn.ModuleList, nn.ModuleDict)):
            depth -= 1
        guard = modules[".".join(parts[:depth])]
        if _GUARDED not in guard.__dict__:
            guard.__dict__[_GUARDED] = {}
            guard.register_forward_pre_hook(restore_placements)
        guard.__dict__[_GUARDED][".".join(parts[depth:])] = tuple(placements)


def remove_guards(modules: Iterable[nn.Module]) -> None:
    """Remove the guards on these modules."""
    for module in list(modules):
        if module.__dict__.pop(_GUARDED, None) is not None:
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook is restore_placements:
                    del module._forward_pre_hooks[key]


def _as_tuple(placement: Mapping[str, Any] | None) -> tuple[int, int, tuple[int, ...]] | None:
    """Return a placement as numbers, or None."""
    return None if placement is None else (placement["dim"], placement["width"], tuple(placement["index"]))

"""Numbers that a module keeps beside its tensors: refreshed after a cut, remembered, and put back.

Most follow from the shapes. Those that do not (a head count that a forward reads, the values of a buffer that no state
dict holds) are remembered with their first value on the module itself, as plain data, so that the memory is copied and
pickled with it and a later structure that does not list them puts them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gflow_pl.surgery.tensor_table import TensorTable
from gflow_pl.values.module_sizes import shape_attributes

__all__ = [
    "conv_groups",
    "follow_shapes",
    "forget",
    "local_shapes",
    "plain_value",
    "read_attribute",
    "remembered",
    "set_attribute",
]

_MEMORY = "_gflow_original"


def local_shapes(table: TensorTable, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Module name to the shapes of its own tensors by local name; a parametrized module owns its originals too."""
    local: dict[str, dict[str, tuple[int, ...]]] = {}
    for alias, name in table.aliases.items():
        shape = tuple(shapes[name] if name in shapes else table[name].tensor.shape)
        owner, _, leaf = alias.rpartition(".")
        local.setdefault(owner, {})[leaf] = shape
        if "parametrizations" in alias and "parametrizations" in (parts := alias.split(".")):
            at = parts.index("parametrizations")
            local.setdefault(".".join(parts[:at]), {})[".".join(parts[at:])] = shape
    return local


def follow_shapes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The attributes that follow from these shapes of the module's own tensors; a convolution without filters has one group."""
    values = shape_attributes(module, shapes)
    if values.get("groups") == 0:
        values["groups"] = 1
    return {name: value for name, value in values.items() if hasattr(module, name)}


def conv_groups(num_groups: int, kept: torch.Tensor) -> int:
    """Groups of a grouped convolution after a cut of its filters.

    Shapes alone do not tell whether whole groups went or the same positions of every group; the filters do.

    Args:
        num_groups: Groups before.
        kept: (filters,) bool.
    """
    per_group = kept.view(num_groups, -1).sum(dim=1)
    return max(1, int((per_group > 0).sum()))


def plain_value(value: Any) -> Any:
    """The value as ints, floats, strings, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [plain_value(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_attribute(module: nn.Module, name: str) -> Any:
    """The attribute, or buffer, as plain data."""
    return plain_value(getattr(module, name))


def set_attribute(module: nn.Module, name: str, value: Any, *, remember: bool) -> None:
    """Sets an attribute, or the values of a buffer, if it is another; tuples stay tuples.

    Args:
        module: The module that has it.
        name: Name of the attribute or buffer.
        value: Plain data.
        remember: Keep the first value, for `forget`.
    """
    old = getattr(module, name)
    plain = plain_value(value)
    if plain_value(old) == plain:
        return
    if remember and name not in remembered(module):
        module.__dict__.setdefault(_MEMORY, {})[name] = plain_value(old)
    if isinstance(old, torch.Tensor):
        new = torch.tensor(plain, dtype=old.dtype, device=old.device)
        module._buffers[name] = new if new.numel() else new.reshape(0)
    else:
        setattr(module, name, tuple(plain) if isinstance(old, tuple) else plain)


def remembered(module: nn.Module) -> dict[str, Any]:
    """First values of the attributes that were set with `remember`."""
    return module.__dict__.get(_MEMORY, {})


def forget(module: nn.Module, name: str) -> None:
    """Puts an attribute back to its first value."""
    set_attribute(module, name, remembered(module)[name], remember=False)
    memory = module.__dict__[_MEMORY]
    del memory[name]
    if not memory:
        del module.__dict__[_MEMORY]

"""Numbers that a module stores beside its tensors (``out_channels``, ``num_heads``): updated after a cut, and restored.

Most of them follow from the shapes of the module's tensors. Others do not: a head count that a forward reads, or the
values of a buffer that is not in the state dict. Their first value is recorded on the module itself, as plain data, so
that it is copied and pickled with the module. A structure that does not list them restores the first value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gflow_pl.surgery.tensor_table import TensorTable
from gflow_pl.values.module_sizes import shape_attributes

__all__ = [
    "PlainValue",
    "attributes_from_shapes",
    "groups_after_cut",
    "local_shapes",
    "original_values",
    "plain_value",
    "read_attribute",
    "restore_attribute",
    "set_attribute",
]

PlainValue = object
"""An int, float, string, bool or None, or a list or dict of such values."""

_ORIGINAL_VALUES = "_gflow_original"


def local_shapes(table: TensorTable, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of the tensors that each module holds itself.

    The originals of a parametrization are listed twice: at the parametrization, and at the module that is parametrized
    (as ``parametrizations.weight.original``), because the sizes of that module follow from them.

    Args:
        table: The tensors of a network.
        shapes: Full name to shape, for tensors whose shape is to differ from the present one.

    Returns:
        Module name to local tensor name to shape.
    """
    local: dict[str, dict[str, tuple[int, ...]]] = {}
    for alias, name in table.aliases.items():
        shape = tuple(shapes[name] if name in shapes else table[name].tensor.shape)
        owner, _, leaf = alias.rpartition(".")
        local.setdefault(owner, {})[leaf] = shape
        if "parametrizations" in alias and "parametrizations" in (parts := alias.split(".")):
            at = parts.index("parametrizations")
            local.setdefault(".".join(parts[:at]), {})[".".join(parts[at:])] = shape
    return local


def attributes_from_shapes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the attributes of a module that follow from the shapes of its tensors, with their values for these shapes.

    A convolution without filters gets one group, since torch accepts no smaller number.

    Args:
        module: A module.
        shapes: Local tensor name to shape.

    Returns:
        Attribute name to value: an int, or a tuple of ints for ``normalized_shape``.
    """
    values = shape_attributes(module, shapes)
    if values.get("groups") == 0:
        values["groups"] = 1
    return {name: value for name, value in values.items() if hasattr(module, name)}


def groups_after_cut(num_groups: int, kept: torch.Tensor) -> int:
    """Return the number of groups of a grouped convolution after a cut of its filters.

    Shapes do not determine it: removing half of the groups and removing half of the filters of every group result in
    the same shape.

    Args:
        num_groups: Number of groups before the cut.
        kept: (filters,) bool, filters that stay.
    """
    per_group = kept.view(num_groups, -1).sum(dim=1)
    return max(1, int((per_group > 0).sum()))


def plain_value(value: object) -> PlainValue:
    """Return a value as plain data: tensors and tuples become lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [plain_value(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_attribute(module: nn.Module, name: str) -> PlainValue:
    """Return an attribute or buffer of a module as plain data."""
    return plain_value(getattr(module, name))


def set_attribute(module: nn.Module, name: str, value: object, *, record: bool) -> None:
    """Set an attribute or the values of a buffer, unless it has that value already. A tuple stays a tuple.

    Args:
        module: The module.
        name: Name of an attribute or buffer that exists.
        value: Plain data, or a tensor.
        record: Whether the first value is recorded for `restore_attribute`.
    """
    old = getattr(module, name)
    plain = plain_value(value)
    if plain_value(old) == plain:
        return
    if record and name not in original_values(module):
        module.__dict__.setdefault(_ORIGINAL_VALUES, {})[name] = plain_value(old)
    if isinstance(old, torch.Tensor):
        new = torch.tensor(plain, dtype=old.dtype, device=old.device)
        module._buffers[name] = new if new.numel() else new.reshape(0)
    else:
        setattr(module, name, tuple(plain) if isinstance(old, tuple) and isinstance(plain, list) else plain)


def original_values(module: nn.Module) -> dict[str, PlainValue]:
    """Return the first values of the attributes that were set with ``record=True``, by name."""
    return module.__dict__.get(_ORIGINAL_VALUES, {})


def restore_attribute(module: nn.Module, name: str) -> None:
    """Set an attribute to its recorded first value and delete the record."""
    set_attribute(module, name, original_values(module)[name], record=False)
    values = module.__dict__[_ORIGINAL_VALUES]
    del values[name]
    if not values:
        del module.__dict__[_ORIGINAL_VALUES]

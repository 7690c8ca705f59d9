"""Check that a structure, which may come from any file, fits a network, before anything is changed or allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gflow_pl.common.checks import is_whole_number
from gflow_pl.common.errors import SettingsError
from gflow_pl.surgery.expansion import expansion_of
from gflow_pl.surgery.module_attributes import attributes_from_shapes, local_shapes, original_values, plain_value
from gflow_pl.surgery.tensor_table import TensorTable
from gflow_pl.values import Structure

__all__ = ["check_fits", "check_shapes_of_file"]

_MAX_PROBLEMS = 5
"""Number of problems that a message lists."""
_MAX_NDIM = 8
_SIZES_OF_TORCH = frozenset(["unflattened_size", "groups"])
"""Constants of torch's modules that are sizes of channels, although they follow from no tensor of the module."""


def check_fits(table: TensorTable, structure: Structure) -> None:
    """Raise unless a structure describes a network, pruned or not, whose tensors a table lists.

    Args:
        table: The tensors and modules of the network.
        structure: The structure.

    Raises:
        SettingsError: The structure has tensors or modules that the network lacks, tensors with another number of
            dims, attributes that are no sizes of the network or contradict its shapes, or expansions of modules that
            have no channels of that number.
    """
    problems = [*_tensor_problems(table, structure)]
    shapes = {table.aliases[name]: tuple(shape) for name, shape in structure.shapes.items() if name in table.aliases}
    local = local_shapes(table, {} if problems else shapes)
    problems += _attribute_problems(table, structure, local)
    problems += _placement_problems(table, structure, local)
    if problems:
        more = f" and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise SettingsError(
            f"Structure does not fit {type(table.modules['']).__name__}: "
            f"{'; '.join(problems[:_MAX_PROBLEMS])}{more}. Build the network with the settings that it was made with."
        )


def check_shapes_of_file(structure: Structure, tensors: Mapping[str, object]) -> None:
    """Raise unless a structure describes the tensors that it was saved with.

    Args:
        structure: The structure in a file.
        tensors: The state dict in that file.

    Raises:
        SettingsError: A tensor has another shape than the structure says.
    """
    for name, shape in structure.shapes.items():
        tensor = tensors.get(name)
        if isinstance(tensor, Tensor) and tuple(tensor.shape) != tuple(shape):
            raise SettingsError(
                f"The file was damaged or changed: its tensor '{name}' has shape {tuple(tensor.shape)}, its structure "
                f"says {tuple(shape)}."
            )


def _tensor_problems(table: TensorTable, structure: Structure) -> Iterator[str]:
    """Yield a sentence for every tensor that the network lacks, or that has another number of dims in it."""
    for name, shape in structure.shapes.items():
        if name not in table.aliases:
            yield f"no tensor '{name}'"
        elif table[table.aliases[name]].tensor.ndim != len(shape):
            found = tuple(table[table.aliases[name]].tensor.shape)
            yield f"'{name}' has shape {found}, the structure has {tuple(shape)}"


# -- attributes ------------------------------------------------------------------------------------------------------


def _attribute_problems(
    table: TensorTable, structure: Structure, local: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> Iterator[str]:
    """Yield a sentence for every attribute that the network lacks, that is no size, or that contradicts the shapes."""
    for name, values in structure.attributes.items():
        module = table.modules.get(name)
        if module is None:
            yield f"no module '{name}'"
            continue
        from_shapes = attributes_from_shapes(module, local[name]) if name in local else {}
        for key, value in values.items():
            if key in from_shapes:
                if not _follows_from_shapes(module, key, values, from_shapes, local[name]):
                    yield f"'{key}' of module '{name}' is {value!r:.40}, its tensors have {from_shapes[key]}"
            elif not _is_known(module, key):
                yield f"module '{name}' has no '{key}'"
            elif not _may_become(module, key, value):
                yield f"'{key}' of module '{name}' cannot become {value!r:.40}"


def _follows_from_shapes(
    module: nn.Module,
    name: str,
    values: Mapping[str, object],
    from_shapes: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool:
    """Return whether a listed attribute is the one that follows from the shapes of a module's tensors.

    The number of groups of a convolution or norm, and with it a convolution's widths, does not follow from them alone.

    Args:
        module: The module.
        name: Name of the attribute.
        values: The listed attributes of the module.
        from_shapes: The attributes that follow from the shapes, with the module's present number of groups.
        shapes: Shapes of the module's tensors.
    """
    if plain_value(from_shapes[name]) == plain_value(values[name]):
        return True
    key = "num_groups" if name == "num_groups" else "groups"
    groups = values.get(key)
    if not is_whole_number(groups) or groups < 1 or getattr(module, key, 1) == groups == 1:
        return False
    sizes = {size for shape in shapes.values() for size in shape}
    if name in ("groups", "num_groups"):
        return any(size % groups == 0 for size in sizes)
    return values[name] in {size * factor for size in sizes for factor in (1, groups)}


def _is_known(module: nn.Module, name: str) -> bool:
    """Return whether a module stores a value under a name that a structure may list."""
    if name in module._buffers:
        return name in module._non_persistent_buffers_set
    constants: set[str] = set()
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn"):
            constants.update(getattr(kind, "__constants__", ()))
    return name in vars(module) and not name.startswith("_") and name not in constants - _SIZES_OF_TORCH


def _may_become(module: nn.Module, name: str, value: object) -> bool:
    """Return whether a cut can have given a value to an attribute, or to a buffer outside of the state dict."""
    present = getattr(module, name)
    if isinstance(present, Tensor):
        return _fits_buffer(present, value)
    return _is_smaller_size(plain_value(value), plain_value(original_values(module).get(name, present)))


def _fits_buffer(buffer: Tensor, value: object) -> bool:
    """Return whether nested lists of numbers have the kind of number and of dims of a buffer."""
    try:
        tensor = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    is_of_kind = torch.can_cast(tensor.dtype, buffer.dtype) or tensor.numel() == 0
    return is_of_kind and (tensor.ndim == buffer.ndim or tensor.numel() == 0)


def _is_smaller_size(value: object, original: object) -> bool:
    """Return whether a value is the original one, or a whole number, or a list of them, that is not larger."""
    if isinstance(original, list):
        return (
            isinstance(value, list)
            and len(value) == len(original)
            and all(_is_smaller_size(new, old) for new, old in zip(value, original, strict=True))
        )
    if type(value) is not type(original):
        return False
    return value == original or (type(value) is int and type(original) is int and 0 <= value <= original)


# -- expansions and gathers ------------------------------------------------------------------------------------------


def _placement_problems(
    table: TensorTable, structure: Structure, local: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> Iterator[str]:
    """Yield a sentence for every expansion or gather of a module that has no channels of that number."""
    for entries in (structure.expansions, structure.gathers):
        for name, entry in entries.items():
            if name not in table.modules:
                yield f"no module '{name}' to expand"
            elif not -_MAX_NDIM <= entry["dim"] < _MAX_NDIM:
                yield f"the expansion of module '{name}' has dim {entry['dim']}"
            elif not _has_channels(table, name, local, structure.attributes.get(name, {}), entry):
                yield f"module '{name}' has no {len(entry['index'])} channels to expand"


def _has_channels(
    table: TensorTable,
    name: str,
    local: Mapping[str, Mapping[str, tuple[int, ...]]],
    values: Mapping[str, object],
    entry: Mapping[str, Any],
) -> bool:
    """Return whether a module has as many channels as an expansion scatters, or a gather reads.

    Args:
        table: The tensors and modules of the network.
        name: Name of the module.
        local: Shapes of the tensors that every module holds, in the structure.
        values: Attributes of the module in the structure.
        entry: The expansion or gather.
    """
    module, count = table.modules[name], len(entry["index"])
    groups = values.get("groups", getattr(module, "groups", 1))
    sizes = {size for shape in local.get(name, {}).values() for size in shape}
    if sizes:
        return count in sizes or any(size * groups == count for size in sizes if isinstance(groups, int))
    if not module._modules:  # a norm without weights
        return hasattr(module, "num_features")

    # A module that uses the weights of modules in it: the full width is one of theirs, too.
    inner = f"{name}." if name else ""
    sizes = {size for part, shapes in local.items() if part.startswith(inner) for s in shapes.values() for size in s}
    widths = {size for full in table if full.startswith(inner) for size in table[full].tensor.shape}
    present = expansion_of(module)
    return count in sizes and entry["width"] in widths | ({present["width"]} if present else set())

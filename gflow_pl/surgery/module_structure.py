"""Reading the `Structure` of a network, and giving a network the shape that a structure describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from gflow_pl.common.errors import SettingsError
from gflow_pl.common.own_width_attention import update_attention
from gflow_pl.surgery.emptied import update_emptiness
from gflow_pl.surgery.expansion import Placement, expansion_of, gather_of, set_expansion, set_gather
from gflow_pl.surgery.module_attributes import (
    attributes_from_shapes,
    local_shapes,
    original_values,
    read_attribute,
    restore_attribute,
    set_attribute,
)
from gflow_pl.surgery.placement_guard import restore_all, update_guards
from gflow_pl.surgery.structure_checks import check_fits
from gflow_pl.surgery.tensor_table import TensorTable, empty_like_format
from gflow_pl.values import Structure

__all__ = ["apply_structure", "structure_from", "structure_of"]

_Entry = TypeVar("_Entry")


def structure_of(module: nn.Module) -> Structure:
    """Return the present shape of any module, pruned or not, or of a module that contains pruned ones.

    The structure lists all parameters, and the buffers that are in the state dict. Other buffers are listed, with their
    values, only if a rewrite has cut them.

    Args:
        module: The module.
    """
    return structure_from(TensorTable(module))


def structure_from(table: TensorTable) -> Structure:
    """Return the present shape of the network that a table was made of."""
    restore_all(table.modules.values())
    shapes = {name: tuple(entry.tensor.shape) for name, entry in table.items() if entry.persistent}
    local = local_shapes(table, {})
    attributes: dict[str, dict[str, Any]] = {}
    expansions: dict[str, dict[str, Any]] = {}
    gathers: dict[str, dict[str, Any]] = {}
    for name, module in _modules_by_first_name(table).items():
        from_shapes = attributes_from_shapes(module, local[name]) if name in local else {}
        values = {key: read_attribute(module, key) for key in [*from_shapes, *original_values(module)]}
        if values:
            attributes[name] = values
        expansion = expansion_of(module)
        if expansion is not None:
            expansions[name] = expansion
        gather = gather_of(module)
        if gather is not None:
            gathers[name] = gather
    return Structure(shapes=shapes, attributes=attributes, expansions=expansions, gathers=gathers)


def _modules_by_first_name(table: TensorTable) -> dict[str, nn.Module]:
    """Return every module once, under its first name, which is the one that a structure uses."""
    first = {module: name for name, module in reversed(table.modules.items())}
    return {name: module for name, module in table.modules.items() if first[module] == name}


def apply_structure(model: nn.Module, structure: Structure | Mapping[str, Any]) -> None:
    """Give a network the shape that a structure describes, whether that is smaller or larger than its present shape.

    Parameters stay the same objects. Tensors whose shape changes are filled with zeros, so load the weights afterwards;
    other tensors keep their values. Attributes that follow from the shapes, expansions and gathers become those of the
    structure. Applying a structure a second time changes nothing. A structure of a network that contains this one as a
    submodule (``net.conv1.weight`` for ``conv1.weight``) fits as well. If the structure does not fit, nothing is
    changed.

    Args:
        model: A network of the same architecture, of any width.
        structure: Result of `rewrite` or `structure_of`, or its ``as_dict()``.

    Raises:
        SettingsError: The structure has tensors or modules that the network lacks, tensors with another number of
            dims, attributes that are no sizes of the network, or tensors that are too large for the memory.
    """
    # Check that the structure fits.
    wanted = structure if isinstance(structure, Structure) else Structure.from_dict(structure)
    table = TensorTable(model)
    wanted = _matching_part(table, wanted)
    check_fits(table, wanted)
    modules = _modules_by_first_name(table)
    shapes = {table.aliases[name]: tuple(shape) for name, shape in wanted.shapes.items()}
    # Tensors that are created in inference mode could not be trained.
    with torch.inference_mode(False), torch.no_grad():
        resized = _resized(table, shapes)
        # Attributes.
        local = local_shapes(table, shapes)
        for name, module in modules.items():
            listed = wanted.attributes.get(name, {})
            for attribute in [a for a in original_values(module) if a not in listed]:
                restore_attribute(module, attribute)
            from_shapes = attributes_from_shapes(module, local[name]) if name in local else {}
            for attribute, value in {**from_shapes, **listed}.items():
                set_attribute(module, attribute, value, record=attribute not in from_shapes)
        # Tensors.
        for name, tensor in resized.items():
            table[name].put(tensor)
        # Hooks and replaced forwards.
        has_emptied_layers = any(not entry["index"] for entry in wanted.expansions.values())
        for name, module in modules.items():
            set_expansion(module, _placement(wanted.expansions.get(name)))
            set_gather(module, _placement(wanted.gathers.get(name)))
            update_emptiness(module, network_has_emptied_layers=has_emptied_layers)
        for module in modules.values():
            update_attention(module)  # after the hooks of all modules
        update_guards(table.modules)
    if resized:
        model.zero_grad(set_to_none=True)


def _placement(entry: Mapping[str, Any] | None) -> Placement | None:
    """Return an entry of `Structure.expansions` or `Structure.gathers` as a placement."""
    return None if entry is None else Placement(entry["dim"], entry["width"], entry["index"])


def _resized(table: TensorTable, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return zeros for every tensor that gets another shape."""
    resized = {}
    for name, shape in shapes.items():
        if tuple(table[name].tensor.shape) != shape:
            try:
                resized[name] = empty_like_format(table[name].tensor, shape).zero_()
            except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
                raise SettingsError(f"Structure: there is no memory for '{name}' of shape {shape}.") from error
    return resized


def _matching_part(table: TensorTable, structure: Structure) -> Structure:
    """Return the part of a structure that describes a network: all of it, or the one submodule that has its tensors.

    A structure that does not fit at all is returned as it is; `check_fits` then reports the differences.

    Raises:
        SettingsError: Several submodules have all tensors of the network.
    """
    if not table or all(name in table.aliases for name in structure.shapes):
        return structure
    # Prefixes under which all tensors of the network occur.
    names = [name for name, entry in table.items() if entry.persistent]
    prefixes = [full[: -len(names[0])] for full in structure.shapes if full.endswith("." + names[0])] if names else []
    fitting = [prefix for prefix in prefixes if all(prefix + name in structure.shapes for name in names)]
    if len(fitting) > 1:
        raise SettingsError(
            f"Structure: it holds {len(fitting)} networks with these tensors ({', '.join(p[:-1] for p in fitting)}); "
            "apply it to the whole module that it was made of."
        )
    return _submodule_part(structure, fitting[0]) if fitting else structure


def _submodule_part(structure: Structure, prefix: str) -> Structure:
    """Return the structure of a submodule, with names relative to it.

    Args:
        structure: Structure of the whole module.
        prefix: Name of the submodule, with a dot at the end.
    """

    def relative(entries: Mapping[str, _Entry]) -> dict[str, _Entry]:
        """Return the entries of the submodule with relative names."""
        # The entry of the submodule itself has the name "" in the result.
        return {f"{name}."[len(prefix) : -1]: value for name, value in entries.items() if f"{name}.".startswith(prefix)}

    return Structure(
        shapes=relative(structure.shapes),
        attributes=relative(structure.attributes),
        expansions=relative(structure.expansions),
        gathers=relative(structure.gathers),
    )

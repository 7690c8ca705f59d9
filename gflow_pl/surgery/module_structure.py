"""The shape of a network as plain data: read off a network, and given to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gflow_pl.surgery.emptied import follow_emptiness
from gflow_pl.surgery.expansion import expansion_of, gather_of, set_expansion, set_gather
from gflow_pl.surgery.module_attributes import (
    follow_shapes,
    forget,
    local_shapes,
    read_attribute,
    remembered,
    set_attribute,
)
from gflow_pl.surgery.tensor_table import TensorTable, empty_like_format
from gflow_pl.values import Structure

__all__ = ["apply_structure", "structure_from", "structure_of"]

_MAX_NAMED = 5


def structure_of(module: nn.Module) -> Structure:
    """The present shape of any module, pruned or not, or of one that contains pruned ones.

    Listed are all parameters and the buffers that a state dict has; buffers that it has not are listed, with their values, only
    where a rewrite has cut them.
    """
    return structure_from(TensorTable(module))


def structure_from(table: TensorTable) -> Structure:
    """The present shape of the network that the table was made of."""
    shapes = {name: tuple(entry.tensor.shape) for name, entry in table.items() if entry.persistent}
    local = local_shapes(table, {})
    attributes: dict[str, dict[str, Any]] = {}
    expansions: dict[str, dict[str, Any]] = {}
    gathers: dict[str, dict[str, Any]] = {}
    for name, module in _once(table.modules).items():
        follow = follow_shapes(module, local[name]) if name in local else {}
        values = {key: read_attribute(module, key) for key in [*follow, *remembered(module)]}
        if values:
            attributes[name] = values
        expansion = expansion_of(module)
        if expansion is not None:
            expansions[name] = expansion
        gather = gather_of(module)
        if gather is not None:
            gathers[name] = gather
    return Structure(shapes=shapes, attributes=attributes, expansions=expansions, gathers=gathers)


def _once(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Every module under its first name, the one that a structure speaks of, where a network has it in several places."""
    first = {module: name for name, module in reversed(modules.items())}
    return {name: module for name, module in modules.items() if first[module] == name}


def apply_structure(model: nn.Module, structure: Structure | Mapping[str, Any]) -> None:
    """Gives a network the shape that a structure describes, smaller or bigger than its present one.

    Tensors stay the same objects. Those whose shape changes are filled with zeros, the others keep their values: load the
    weights afterwards. Numbers that follow from the shapes and expansions become those of the structure, too. Doing it
    twice changes nothing. A structure of a network that contains this one under a name (``net.conv1.weight`` for
    ``conv1.weight``) fits as well. Nothing is changed if it does not fit.

    Args:
        model: A network of the same architecture, of any width.
        structure: What `rewrite` or `structure_of` returned, or its ``as_dict()``.

    Raises:
        ValueError: The structure names tensors or modules that the network does not have, or of another number of dims.
    """
    wanted = structure if isinstance(structure, Structure) else Structure.from_dict(structure)
    table = TensorTable(model)
    wanted = _part_that_fits(table, wanted)
    _check(table, table.modules, wanted)
    modules = _once(table.modules)
    shapes = {table.aliases[name]: tuple(shape) for name, shape in wanted.shapes.items()}
    with torch.inference_mode(False), torch.no_grad():
        local = local_shapes(table, shapes)
        for name, module in modules.items():
            listed = wanted.attributes.get(name, {})
            for attribute in [a for a in remembered(module) if a not in listed]:
                forget(module, attribute)
            follow = follow_shapes(module, local[name]) if name in local else {}
            for attribute, value in {**follow, **listed}.items():
                set_attribute(module, attribute, value, remember=attribute not in follow)
        changed = _resize(table, shapes)
        emptied = any(not entry["index"] for entry in wanted.expansions.values())
        for name, module in modules.items():
            set_expansion(module, _placed(wanted.expansions.get(name)))
            set_gather(module, _placed(wanted.gathers.get(name)))
            follow_emptiness(module, emptied=emptied)
    if changed:
        model.zero_grad(set_to_none=True)


def _placed(entry: Mapping[str, Any] | None) -> tuple[int, int, list[int]] | None:
    return None if entry is None else (entry["dim"], entry["width"], entry["index"])


def _resize(table: TensorTable, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Fills those tensors with zeros whose shape is another; whether there were any."""
    others = {name: shape for name, shape in shapes.items() if tuple(table[name].tensor.shape) != shape}
    for name, shape in others.items():
        table[name].put(empty_like_format(table[name].tensor, shape).zero_())
    return bool(others)


def _part_that_fits(table: TensorTable, structure: Structure) -> Structure:
    """The structure itself, or the part of it that speaks of this network under a prefix."""
    if not table or all(name in table.aliases for name in structure.shapes):
        return structure
    names = [name for name, entry in table.items() if entry.persistent]
    prefixes = [full[: -len(names[0])] for full in structure.shapes if full.endswith("." + names[0])] if names else []
    fitting = [prefix for prefix in prefixes if all(prefix + name in structure.shapes for name in names)]
    if len(fitting) > 1:
        raise ValueError(
            f"Structure: it holds {len(fitting)} networks with these tensors ({', '.join(p[:-1] for p in fitting)}); "
            "apply it to the whole module that it was made of."
        )
    return _below(structure, fitting[0]) if fitting else structure


def _below(structure: Structure, prefix: str) -> Structure:
    def cut(entries: Mapping[str, Any]) -> dict[str, Any]:
        # The part itself is a module too, and its name there is empty here.
        return {f"{name}."[len(prefix) : -1]: value for name, value in entries.items() if f"{name}.".startswith(prefix)}

    fields = (structure.shapes, structure.attributes, structure.expansions, structure.gathers)
    return Structure(*(cut(entries) for entries in fields))


def _check(table: TensorTable, modules: Mapping[str, nn.Module], structure: Structure) -> None:
    problems = []
    for name, shape in structure.shapes.items():
        if name not in table.aliases:
            problems.append(f"no tensor '{name}'")
        elif table[table.aliases[name]].tensor.ndim != len(shape):
            found = tuple(table[table.aliases[name]].tensor.shape)
            problems.append(f"'{name}' has shape {found}, the structure says {tuple(shape)}")
    for name, values in structure.attributes.items():
        if name not in modules:
            problems.append(f"no module '{name}'")
        else:
            problems += [f"module '{name}' has no '{key}'" for key in values if not hasattr(modules[name], key)]
    placed = [*structure.expansions, *structure.gathers]
    problems += [f"no module '{name}' to expand" for name in placed if name not in modules]
    if problems:
        more = f" and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise ValueError(
            f"Structure does not fit {type(next(iter(modules.values()))).__name__}: "
            f"{'; '.join(problems[:_MAX_NAMED])}{more}. Build the network with the settings that it was made with."
        )

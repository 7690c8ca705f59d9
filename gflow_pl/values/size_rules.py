"""Whole numbers that modules keep (a head count, the sizes of a split) and that follow from the sizes of groups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["SizeAttribute", "SizeRule", "size_rules_as_dict", "size_rules_from_dict"]

_ELEMENT = re.compile(r"(.+)\[(\d+)\]", re.DOTALL)


class SizeAttribute(NamedTuple):
    """The address of a whole number that a module keeps.

    Attributes:
        module: Name of the module, as in ``named_modules()``.
        name: Name of the attribute.
        element: Position in the attribute if that is a list or tuple; None if the attribute is the number itself.
    """

    module: str
    name: str
    element: int | None = None


@dataclass(frozen=True)
class SizeRule:
    """How a whole number follows from the sizes of groups.

    Attributes:
        base: Part of the number that no group changes.
        per_unit: Group name to what each unit present adds.
    """

    base: int
    per_unit: Mapping[str, int] = field(default_factory=dict)

    def value(self, sizes: Mapping[str, int]) -> int:
        """Return the number for groups of these sizes.

        Args:
            sizes: Group name to the number of units present.
        """
        return self.base + sum(count * sizes[name] for name, count in self.per_unit.items())


def size_rules_as_dict(rules: Mapping[SizeAttribute, SizeRule]) -> dict[str, dict[str, Any]]:
    """Return the rules as plain data for a checkpoint.

    Returns:
        Module name to ``{attribute: {"base": int, "per_unit": {group name: int}}}``. An attribute is written as its
        name, an element of a list as ``name[index]``.
    """
    plain: dict[str, dict[str, Any]] = {}
    for (module, name, element), rule in rules.items():
        key = name if element is None else f"{name}[{element}]"
        plain.setdefault(module, {})[key] = {"base": rule.base, "per_unit": dict(rule.per_unit)}
    return plain


def size_rules_from_dict(data: Mapping[str, Mapping[str, Any]]) -> dict[SizeAttribute, SizeRule]:
    """Return the rules that `size_rules_as_dict` described."""
    rules = {}
    for module, attributes in data.items():
        for key, rule in attributes.items():
            match = _ELEMENT.fullmatch(key)
            attribute = SizeAttribute(module, match[1], int(match[2])) if match else SizeAttribute(module, key)
            rules[attribute] = SizeRule(rule["base"], dict(rule["per_unit"]))
    return rules

"""Tables from names of operators to rules."""

from __future__ import annotations

from collections.abc import Mapping

from gflow_pl.channels.rules.operator_call import Rule

__all__ = ["rule_table"]


def rule_table(names: Mapping[Rule, str]) -> dict[str, Rule]:
    """Return the table from each name to its rule.

    Args:
        names: Rule to the names of its operators, separated by white space, without namespace and overload. The name
            of the in-place variant of an operator, with an underscore behind it, is only needed if the rules differ.
    """
    return {name: rule for rule, line in names.items() for name in line.split()}

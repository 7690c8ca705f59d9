"""Settings that take one of a few strings: a `Literal` type for each, and the check that reads the type.

A signature names the type, and `check_choice` derives the valid values from the same type: no other list of them
exists.
"""

from __future__ import annotations

from typing import Literal, get_args

from gflow_pl.common.errors import SettingsError

__all__ = [
    "Bias",
    "Frozen",
    "Residual",
    "Scope",
    "Target",
    "TrackOrder",
    "UnitScore",
    "check_choice",
]

Target = Literal["filters", "parameters", "macs"]
"""Quantity that a pruning fraction is a share of: filters, parameters or multiply-accumulates."""

Scope = Literal["global", "layer"]
"""Whether units are ranked across all groups or within their own group."""

UnitScore = Literal["mean", "sum", "max"]
"""Reduction from the scores of all filters in a unit to the score of the unit."""

Residual = Literal["expand", "remove"]
"""Whether a residual stream keeps its width (expand) or shrinks with the layers that write into it (remove)."""

Frozen = Literal["keep", "expand"]
"""Whether a layer that cannot lose a filter is left whole (keep) or expanded."""

Bias = Literal["none", "magnitude", "distance_from_init"]
"""Factor on each weight's contribution to the score of its filter: 1, the weight's magnitude, or its distance from
its initial value."""

TrackOrder = Literal["formula", "published"]
"""Weights that tracked scores combine with the gradient of a step: those before it (formula) or after it (published).
"""


def check_choice(name: str, value: object, choice: object, *, caller: str = "") -> None:
    """Raise if the value of a setting is not one of its valid values.

    Args:
        name: Name of the setting, for the message.
        value: Value of the setting. None is never valid: callers skip the check if a setting may be None and is None.
        choice: A `Literal` type, such as `Target`.
        caller: Function or class that takes the setting; starts the message if given.

    Raises:
        SettingsError: `value` is not one of the values of `choice`.

    Example:
        >>> check_choice("scope", "global", Scope)
        >>> check_choice("scope", "local", Scope)
        Traceback (most recent call last):
        ...
        gflow_pl.common.errors.SettingsError: `scope` must be one of global, layer, got 'local'.
    """
    valid = get_args(choice)
    if value not in valid:
        where = f"{caller}: " if caller else ""
        raise SettingsError(f"{where}`{name}` must be one of {', '.join(valid)}, got {value!r}.")

"""Checks of single settings. Each raises a `SettingsError` that names the setting, the expected and the given value."""

from __future__ import annotations

import math
import os
from typing import TypeGuard, get_args

from gflow_pl.common.errors import SettingsError

__all__ = [
    "check_choice",
    "check_flag",
    "check_function",
    "check_names",
    "check_path",
    "check_positive",
    "check_share",
    "check_whole_number",
    "is_number",
    "is_whole_number",
]


def is_whole_number(value: object) -> TypeGuard[int]:
    """Return whether a value is an int; bools, which Python counts as ints, are not whole numbers."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite int or float; bools are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_flag(name: str, value: object) -> None:
    """Raise unless a setting is a bool: a string such as "false" would count as true."""
    if not isinstance(value, bool):
        raise SettingsError(f"`{name}` must be true or false, got {value!r}.")


def check_whole_number(name: str, value: object, least: int, *, caller: str = "") -> None:
    """Raise unless a setting is a whole number of at least `least`; `caller` starts the message if given."""
    if not (is_whole_number(value) and value >= least):
        raise SettingsError(f"{_prefix(caller)}`{name}` must be a whole number >= {least}, got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Raise unless a setting is a finite number > 0."""
    if not (is_number(value) and value > 0):
        raise SettingsError(f"`{name}` must be > 0, got {value!r}.")


def check_share(name: str, value: object, *, excludes_zero: bool = False) -> None:
    """Raise unless a setting is a number in [0, 1], or in (0, 1] if `excludes_zero`."""
    if not (is_number(value) and 0 <= value <= 1 and (value or not excludes_zero)):
        raise SettingsError(f"`{name}` must be in {'(' if excludes_zero else '['}0, 1], got {value!r}.")


def check_names(name: str, value: object) -> None:
    """Raise unless a setting is a list or tuple of strings; a single string is refused too."""
    if not (isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)):
        raise SettingsError(f'`{name}` must be a list of names such as ["features.0"], got {value!r}.')


def check_function(name: str, value: object, *, caller: str = "") -> None:
    """Raise unless a setting can be called; `caller` starts the message if given."""
    if not callable(value):
        raise SettingsError(f"{_prefix(caller)}`{name}` must be a function (module, batch), got {value!r}.")


def check_path(name: str, value: object) -> None:
    """Raise unless a setting is the path of a file, as a string or a path object."""
    if not isinstance(value, (str, os.PathLike)):
        raise SettingsError(f"`{name}` must be the path of a file, got {value!r}.")


def check_choice(name: str, value: object, choice: object, *, caller: str = "") -> None:
    """Raise if the value of a setting is not one of its valid values.

    Args:
        name: Name of the setting, for the message.
        value: Value of the setting. None is never valid: callers skip the check if a setting may be None and is None.
        choice: A `Literal` type of valid values.
        caller: Function or class that takes the setting; starts the message if given.

    Raises:
        SettingsError: `value` is not one of the values of `choice`.

    Example:
        >>> from typing import Literal
        >>> Scope = Literal["global", "layer"]
        >>> check_choice("scope", "global", Scope)
        >>> check_choice("scope", "local", Scope)
        Traceback (most recent call last):
        ...
        gflow_pl.common.errors.SettingsError: `scope` must be one of global, layer, got 'local'.
    """
    valid = get_args(choice)
    if value not in valid:
        raise SettingsError(f"{_prefix(caller)}`{name}` must be one of {', '.join(valid)}, got {value!r}.")


def _prefix(caller: str) -> str:
    """Return the start of a message: the function or class that takes the setting, if it is given."""
    return f"{caller}: " if caller else ""

"""Lightning comes in two packages, `pytorch_lightning` and `lightning`, whose classes are twins but not the same."""

from __future__ import annotations

from typing import Any

__all__ = ["is_a"]


def is_a(thing: Any, *class_names: str) -> bool:
    """Whether a class of `thing` has one of these names; so either package's objects are recognised."""
    return any(base.__name__ in class_names for base in type(thing).__mro__)

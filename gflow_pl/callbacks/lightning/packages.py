"""Lightning comes in two packages, `pytorch_lightning` and `lightning`, whose classes are twins but not the same."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import nn

__all__ = ["averages_of", "callbacks_of", "is_a"]


def is_a(thing: Any, *class_names: str) -> bool:
    """Whether a class of `thing` has one of these names; so either package's objects are recognised."""
    return any(base.__name__ in class_names for base in type(thing).__mro__)


def callbacks_of(trainer: pl.Trainer) -> list[Any]:
    """The callbacks of a Trainer of either package."""
    return list(getattr(trainer, "callbacks", []))


def averages_of(trainer: pl.Trainer) -> list[nn.Module]:
    """The copies of the module whose weights WeightAveraging callbacks average."""
    averages = [c._average_model for c in callbacks_of(trainer) if is_a(c, "WeightAveraging")]
    return [average.module for average in averages if average is not None]

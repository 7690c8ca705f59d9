"""Objects of Lightning's two packages, `pytorch_lightning` and `lightning`, which define every class twice."""

from __future__ import annotations

import sys
from typing import TypeVar, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, WeightAveraging
from torch import nn

__all__ = ["averaged_models", "both_packages", "callbacks_of"]

_COUNTERPARTS = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}

_Callback = TypeVar("_Callback", bound=Callback)


def both_packages(*classes: type) -> tuple[type, ...]:
    """Return classes of `pytorch_lightning` or `lightning_fabric` and their counterparts in the package `lightning`.

    The result is for `isinstance`. A user may train with either package, and neither class is a subclass of the other.
    Class names are not enough: a user may define a callback called ``EarlyStopping`` that has nothing in common with Lightning's.

    Args:
        *classes: The classes, as imported from `pytorch_lightning` or `lightning_fabric`. Classes of other packages have no
            counterpart.

    Returns:
        Each class, followed by its counterpart if `lightning` has been imported.

    Example:
        >>> from pytorch_lightning.callbacks import EarlyStopping
        >>> isinstance(EarlyStopping("val_loss"), both_packages(EarlyStopping))
        True
    """
    found: list[type] = []
    for cls in classes:
        found.append(cls)
        package, _, path = cls.__module__.partition(".")
        # A module that has not been imported has no instances.
        counterpart = sys.modules.get(f"{_COUNTERPARTS[package]}.{path}") if package in _COUNTERPARTS else None
        if counterpart is not None:
            found.append(getattr(counterpart, cls.__name__))
    return tuple(found)


def callbacks_of(trainer: pl.Trainer, cls: type[_Callback]) -> list[_Callback]:
    """Return the callbacks of a Trainer that are instances of a class or of its counterpart in the other package.

    Args:
        trainer: A Trainer of either package.
        cls: The class as imported from `pytorch_lightning`; `Callback` for all callbacks.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of the Trainer
    return [cast(_Callback, c) for c in callbacks if isinstance(c, both_packages(cls))]


def averaged_models(trainer: pl.Trainer) -> list[nn.Module]:
    """Return the copies of the module whose weights WeightAveraging callbacks average."""
    averages = [callback._average_model for callback in callbacks_of(trainer, WeightAveraging)]
    return [average.module for average in averages if average is not None]

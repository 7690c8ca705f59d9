"""Objects of Lightning's two packages, `pytorch_lightning` and `lightning`, which define every class twice."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import installed_packages, pl

__all__ = ["Callback", "attached_trainer", "averaged_models", "both_packages", "callbacks_of", "private_attribute"]

_COUNTERPARTS = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}

if TYPE_CHECKING:
    Callback = pl.Callback
else:

    class Callback(*(package.Callback for package in installed_packages())):
        """A callback of every package of Lightning that is installed: the Trainers and CLIs of all of them take it."""


_Callback = TypeVar("_Callback", bound=pl.callbacks.Callback)


def both_packages(*classes: type) -> tuple[type, ...]:
    """Return classes of `pytorch_lightning` or `lightning_fabric` and their counterparts in the package `lightning`.

    The result is for `isinstance`. A user may train with either package, and neither class is a subclass of the other.
    Class names are not enough: a user may define a callback called ``EarlyStopping`` that has nothing in common with
    Lightning's.

    Args:
        *classes: The classes, as imported from `pytorch_lightning` or `lightning_fabric`. Classes of other packages
            have no counterpart.

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


def private_attribute(owner: object, name: str, purpose: str) -> Any:
    """Return a private attribute of an object of Lightning, or raise if the installed version has none of this name.

    For attributes without which training would go on with wrong results. `getattr` with a default would hide that.

    Args:
        owner: The object.
        name: The name of the attribute.
        purpose: What the attribute is needed for, to complete "is needed to ...".

    Raises:
        SettingsError: The attribute does not exist.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise SettingsError(
            f"{type(owner).__name__} of pytorch-lightning {pl.__version__} has no attribute `{name}`, which is needed "
            f"to {purpose}: install a version that gflow_pl was tested with (see the dependencies in its "
            "pyproject.toml)."
        ) from None


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """Return the Trainer that a module is attached to; None if there is none, or if Fabric runs the module."""
    try:
        trainer = module.trainer
    except RuntimeError:  # raised by the property `LightningModule.trainer`
        return None
    return trainer if isinstance(trainer, both_packages(pl.Trainer)) else None


def callbacks_of(trainer: pl.Trainer, cls: type[_Callback]) -> list[_Callback]:
    """Return the callbacks of a Trainer that are instances of a class or of its counterpart in the other package.

    Args:
        trainer: A Trainer of either package.
        cls: The class as imported from `pytorch_lightning`; `pl.Callback` for all callbacks.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of the Trainer
    return [cast(_Callback, c) for c in callbacks if isinstance(c, both_packages(cls))]


def averaged_models(trainer: pl.Trainer) -> list[nn.Module]:
    """Return the copies of the module whose weights WeightAveraging callbacks average."""
    # Private; without it a pruned module would be averaged with a full-size copy, and the next update would fail.
    averages = [callback._average_model for callback in callbacks_of(trainer, pl.callbacks.WeightAveraging)]
    return [average.module for average in averages if average is not None]

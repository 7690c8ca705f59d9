"""The list of built-in measures, and the look-up by name.

To add a built-in measure, write its class and list it in `MEASURES`. Names, aliases, error messages, the choices of the
commands and the tests are derived from this list.
"""

from __future__ import annotations

import difflib
from typing import get_args

from gflow_pl.common.errors import SettingsError
from gflow_pl.importance.base import ActivationImportance, Importance, Statistic
from gflow_pl.importance.fisher import Fisher, NvidiaTaylor
from gflow_pl.importance.gradient_flow import GradientPreservation, Grasp
from gflow_pl.importance.loss import BiasedLoss, LossPreservation, TaylorFirstOrder, TrackedBiasedLoss
from gflow_pl.importance.magnitude import BatchNormScale, L1Norm, Magnitude, Random

__all__ = ["MEASURES", "measure_names", "resolve_measure"]

MEASURES: tuple[type[Importance], ...] = (
    Magnitude,
    L1Norm,
    BatchNormScale,
    LossPreservation,
    BiasedLoss,
    TrackedBiasedLoss,
    TaylorFirstOrder,
    Fisher,
    NvidiaTaylor,
    Grasp,
    GradientPreservation,
    Random,
)


def measure_names(*, aliases: bool = False) -> tuple[str, ...]:
    """Return the names of all built-in measures.

    Args:
        aliases: Whether to include the other names that are accepted.

    >>> measure_names()[:3]
    ('magnitude', 'l1', 'bn')
    """
    return tuple(name for cls in MEASURES for name in (cls.name, *(cls.aliases if aliases else ())))


def resolve_measure(measure: str | Importance) -> Importance:
    """Return the measure of a name or alias; an `Importance` object is checked and returned unchanged.

    Raises:
        SettingsError: The name is unknown (the message lists the known ones), or the class of the object lacks a name
            or a valid statistic.
    """
    if isinstance(measure, Importance):
        _check_facts(type(measure))
        return measure
    known = {name: cls for cls in MEASURES for name in (cls.name, *cls.aliases)}
    if isinstance(measure, str) and measure in known:
        return known[measure]()
    names = ", ".join(sorted(known))
    if not isinstance(measure, str):
        raise SettingsError(f"`measure` must be a name or an Importance object, got {measure!r}. Known names: {names}.")
    near = difflib.get_close_matches(measure, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise SettingsError(f"Unknown measure '{measure}'. Known: {names}.{hint}")


def _check_facts(cls: type[Importance]) -> None:
    """Raise if a measure does not declare its name or its statistic."""
    if not isinstance(getattr(cls, "name", None), str):
        raise SettingsError(f'Measure {cls.__name__} has no name: add `name = "..."` to the class.')
    statistic, known = getattr(cls, "statistic", None), get_args(Statistic)
    if statistic not in known:
        raise SettingsError(
            f"Measure '{cls.name}': `statistic` must be one of {', '.join(known)}, got {statistic!r}; it defines the "
            "content of `flow`."
        )
    if (statistic == "activation") != issubclass(cls, ActivationImportance):
        raise SettingsError(
            f"Measure '{cls.name}': a measure of activations, and no other, must be a subclass of "
            f"ActivationImportance; got statistic {statistic!r}."
        )

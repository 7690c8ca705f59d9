"""The measures by name."""

from __future__ import annotations

import difflib
from typing import get_args

from gflow_pl.importance.base import Importance, Statistic
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
    """The names of all measures, and with `aliases` their other names too.

    >>> measure_names()[:3]
    ('magnitude', 'l1', 'bn')
    """
    return tuple(name for cls in MEASURES for name in (cls.name, *(cls.aliases if aliases else ())))


def resolve_measure(measure: str | Importance) -> Importance:
    """The measure of a name or alias; an `Importance` is returned as it is.

    Raises:
        ValueError: No measure has this name; the message lists those that exist. Or a class of one's own does not say
            what it is called or what it needs.
    """
    if isinstance(measure, Importance):
        _check_facts(type(measure))
        return measure
    known = {name: cls for cls in MEASURES for name in (cls.name, *cls.aliases)}
    if isinstance(measure, str) and measure in known:
        return known[measure]()
    listed = ", ".join(sorted(known))
    if not isinstance(measure, str):
        raise ValueError(f"`measure` must be a name or an Importance object, got {measure!r}. Known names: {listed}.")
    near = difflib.get_close_matches(measure, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ValueError(f"Unknown measure '{measure}'. Known: {listed}.{hint}")


def _check_facts(cls: type[Importance]) -> None:
    if not isinstance(getattr(cls, "name", None), str):
        raise ValueError(f'Measure {cls.__name__} has no name: write `name = "..."` into the class.')
    statistic, known = getattr(cls, "statistic", None), get_args(Statistic)
    if statistic not in known:
        raise ValueError(
            f"Measure '{cls.name}': `statistic` must be one of {', '.join(known)}, got {statistic!r}; it says what `flow` holds."
        )

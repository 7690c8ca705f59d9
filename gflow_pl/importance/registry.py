"""The measures by name."""

from __future__ import annotations

import difflib

from gflow_pl.importance.base import Importance
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
        ValueError: No measure has this name; the message lists those that exist.
    """
    if isinstance(measure, Importance):
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

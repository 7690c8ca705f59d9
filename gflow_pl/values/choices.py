"""Settings that take one of a few strings: a `Literal` type for each.

A signature names the type, and `gflow_pl.common.checks.check_choice` derives the valid values from the same type: no
other list of them exists.
"""

from __future__ import annotations

from typing import Literal

__all__ = [
    "Bias",
    "Frozen",
    "Residual",
    "Scope",
    "Target",
    "TrackOrder",
    "UnitScore",
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

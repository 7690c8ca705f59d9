"""From rounds to fractions, and from scores to the units that stay.

These are decisions on names and numbers, without modules or data.
"""

from gflow_pl.selection.costs import cost_after
from gflow_pl.selection.schedule import PruningSchedule, round_fraction
from gflow_pl.selection.select import select_units

__all__ = ["PruningSchedule", "cost_after", "round_fraction", "select_units"]

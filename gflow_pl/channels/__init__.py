"""Find out which channels of a network belong together, and why the others cannot be pruned."""

from gflow_pl.channels.trace import trace_channels

__all__ = ["trace_channels"]

"""Which channels of a network belong together, and why the rest is frozen."""

from gflow_pl.channels.trace import trace_channels

__all__ = ["trace_channels"]

"""Which channels of a network belong together, and why the rest is frozen."""

from gflow_pl.channels.graph import ChannelGraph
from gflow_pl.channels.tracing import trace_channels

__all__ = ["ChannelGraph", "trace_channels"]

"""Which channels of a network belong together, and why the rest is frozen."""

from gflow_pl.channels.graph import ChannelGraph

__all__ = ["ChannelGraph"]

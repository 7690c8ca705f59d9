"""The names of `gflow_pl.values` under the path of the first version, for code that imports them from there."""

from gflow_pl.values import ChannelGraph, ChannelGroup, Expansion, KeepPlan, LayerUnits, Scores, Slice, Structure

__all__ = ["ChannelGraph", "ChannelGroup", "Expansion", "KeepPlan", "LayerUnits", "Scores", "Slice", "Structure"]

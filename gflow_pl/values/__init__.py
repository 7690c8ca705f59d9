"""The values that the rooms exchange: groups, graphs, scores, plans and structures.

Each is small, checks its contents on creation, and holds names, numbers or plain tensors. None of them keeps a module
or an autograd graph alive.
"""

from gflow_pl.values.graph import ChannelGraph
from gflow_pl.values.groups import ChannelGroup, Expansion, Layer, LayerUnits, Slice
from gflow_pl.values.keep_plan import KeepPlan
from gflow_pl.values.scores import Scores
from gflow_pl.values.size_rules import SizeAttribute, SizeRule
from gflow_pl.values.structure import Structure

__all__ = [
    "ChannelGraph",
    "ChannelGroup",
    "Expansion",
    "KeepPlan",
    "Layer",
    "LayerUnits",
    "Scores",
    "SizeAttribute",
    "SizeRule",
    "Slice",
    "Structure",
]

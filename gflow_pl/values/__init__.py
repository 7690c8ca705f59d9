"""The values that travel between the rooms: groups, graphs, scores, plans and structures.

Everything here is small, checks its contents when it is made, and holds names, numbers or plain tensors; no module and no
autograd graph is kept alive by it.
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

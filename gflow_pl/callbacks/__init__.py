"""Callbacks that prune while a Trainer trains, and that keep what it does."""

from gflow_pl.callbacks.monitor import GradientFlowMonitor
from gflow_pl.callbacks.pruning import PruningCallback
from gflow_pl.callbacks.run import BestCheckpoint, LastCheckpoint, RunRecorder
from gflow_pl.callbacks.structure import CarriesStructure

__all__ = [
    "BestCheckpoint",
    "CarriesStructure",
    "GradientFlowMonitor",
    "LastCheckpoint",
    "PruningCallback",
    "RunRecorder",
]

"""Callbacks that prune while a Trainer trains, and that keep what it does."""

from gflow_pl.callbacks.lightning.carries_structure import CarriesStructure
from gflow_pl.callbacks.monitor import GradientFlowMonitor
from gflow_pl.callbacks.pruning import PruningCallback, find_pruning_callback
from gflow_pl.callbacks.pruning_state import pruning_state_in
from gflow_pl.callbacks.run_folder import BestCheckpoint, LastCheckpoint, RunRecorder

__all__ = [
    "BestCheckpoint",
    "CarriesStructure",
    "GradientFlowMonitor",
    "LastCheckpoint",
    "PruningCallback",
    "RunRecorder",
    "find_pruning_callback",
    "pruning_state_in",
]

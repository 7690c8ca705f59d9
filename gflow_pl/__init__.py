"""gflow_pl: structured pruning while you train, for PyTorch Lightning.

Public names are imported when they are first used, so that importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers cannot follow `__getattr__`
    from gflow_pl import data, importance, models
    from gflow_pl.callbacks import GradientFlowMonitor, PruningCallback
    from gflow_pl.channels import register_rule, trace_channels
    from gflow_pl.importance import Importance, score_filters
    from gflow_pl.selection import select_units
    from gflow_pl.surgery import (
        StructureMixin,
        apply_structure,
        finalize,
        load_from_checkpoint,
        rewrite,
        structure_of,
    )
    from gflow_pl.tasks import ImageClassifier
    from gflow_pl.values import ChannelGraph, ChannelGroup, KeepPlan, Scores, Structure

__version__ = "0.1.0"

_ROOM_OF_NAME = {
    "ChannelGraph": "values",
    "ChannelGroup": "values",
    "GradientFlowMonitor": "callbacks",
    "ImageClassifier": "tasks",
    "Importance": "importance",
    "KeepPlan": "values",
    "PruningCallback": "callbacks",
    "Scores": "values",
    "Structure": "values",
    "StructureMixin": "surgery",
    "apply_structure": "surgery",
    "finalize": "surgery",
    "load_from_checkpoint": "surgery",
    "register_rule": "channels",
    "rewrite": "surgery",
    "score_filters": "importance",
    "select_units": "selection",
    "structure_of": "surgery",
    "trace_channels": "channels",
}
_ROOMS = ("data", "importance", "models")

__all__ = [
    "ChannelGraph",
    "ChannelGroup",
    "GradientFlowMonitor",
    "ImageClassifier",
    "Importance",
    "KeepPlan",
    "PruningCallback",
    "Scores",
    "Structure",
    "StructureMixin",
    "apply_structure",
    "data",
    "finalize",
    "importance",
    "load_from_checkpoint",
    "models",
    "register_rule",
    "rewrite",
    "score_filters",
    "select_units",
    "structure_of",
    "trace_channels",
]


def __getattr__(name: str) -> Any:
    """Import a public name, or a subpackage (a "room", see docs/design.md), when it is first used."""
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _ROOM_OF_NAME:
        return getattr(importlib.import_module(f"{__name__}.{_ROOM_OF_NAME[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

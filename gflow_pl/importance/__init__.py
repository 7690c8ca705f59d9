"""Importance of filters: the measures, their gradients and Hessian-gradient products, and tracked scores.

`gflow_pl.importance.measures.MEASURES` lists all built-in measures.
"""

from gflow_pl.importance.base import ActivationImportance, Importance
from gflow_pl.importance.fisher import Fisher, NvidiaTaylor
from gflow_pl.importance.gradient_flow import GradientPreservation, Grasp
from gflow_pl.importance.loss import BiasedLoss, LossPreservation, TaylorFirstOrder, TrackedBiasedLoss
from gflow_pl.importance.magnitude import BatchNormScale, L1Norm, Magnitude, Random
from gflow_pl.importance.measures import measure_names, resolve_measure
from gflow_pl.importance.score import score_filters
from gflow_pl.importance.tracker import Tracker

__all__ = [
    "ActivationImportance",
    "BatchNormScale",
    "BiasedLoss",
    "Fisher",
    "GradientPreservation",
    "Grasp",
    "Importance",
    "L1Norm",
    "LossPreservation",
    "Magnitude",
    "NvidiaTaylor",
    "Random",
    "TaylorFirstOrder",
    "TrackedBiasedLoss",
    "Tracker",
    "measure_names",
    "resolve_measure",
    "score_filters",
]

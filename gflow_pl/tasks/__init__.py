"""LightningModules that train a network."""

from gflow_pl.tasks.classification import ImageClassifier
from gflow_pl.tasks.pretrained import load_pretrained

__all__ = ["ImageClassifier", "load_pretrained"]

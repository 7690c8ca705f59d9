"""The best checkpoints and scores that Lightning's callbacks remember."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from gflow_pl.callbacks.lightning.packages import both_packages, callbacks_of

__all__ = ["last_saved_steps", "reset_best_scores"]


def last_saved_steps(trainer: pl.Trainer) -> dict[ModelCheckpoint, int]:
    """The step of the last save of every ModelCheckpoint that monitors nothing: its file of that step counts as best."""
    every = [c for c in callbacks_of(trainer) if isinstance(c, both_packages(ModelCheckpoint)) and c.monitor is None]
    return {checkpoint: checkpoint._last_global_step_saved for checkpoint in every if checkpoint.best_model_path}


def reset_best_scores(trainer: pl.Trainer) -> list[str]:
    """Make monitored ModelCheckpoints and EarlyStopping start anew: what was best before the cut is another network.

    Returns:
        The files that were best until now.
    """
    forgotten = []
    for checkpoint in callbacks_of(trainer):
        if isinstance(checkpoint, both_packages(ModelCheckpoint)) and getattr(checkpoint, "monitor", None) is not None:
            if checkpoint.best_model_path:
                forgotten.append(checkpoint.best_model_path)
            _forget(checkpoint)
        elif isinstance(checkpoint, both_packages(EarlyStopping)):
            checkpoint.wait_count = 0
            checkpoint.best_score = torch.tensor(torch.inf if checkpoint.mode == "min" else -torch.inf)
    return forgotten


def _forget(checkpoint: ModelCheckpoint) -> None:
    checkpoint.best_k_models = {}
    checkpoint.kth_best_model_path = ""
    checkpoint.best_model_score = None
    checkpoint.best_model_path = ""
    checkpoint.kth_value = torch.tensor(torch.inf if checkpoint.mode == "min" else -torch.inf)

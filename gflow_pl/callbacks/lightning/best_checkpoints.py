"""The best checkpoints and scores that callbacks of Lightning remember."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from gflow_pl.callbacks.lightning.packages import callbacks_of

__all__ = ["last_saved_steps", "reset_best_scores"]


def last_saved_steps(trainer: pl.Trainer) -> dict[ModelCheckpoint, int]:
    """Return the global step of the last save of every ModelCheckpoint that monitors no metric and has saved a file.

    Such a ModelCheckpoint treats its newest file as the best one. Comparing the steps before and after a cut shows whether
    that file holds a network from before the cut.
    """
    return {
        # Private; without it a file from before the last cut would be reported as best.
        checkpoint: checkpoint._last_global_step_saved
        for checkpoint in callbacks_of(trainer, ModelCheckpoint)
        if checkpoint.monitor is None and checkpoint.best_model_path
    }


def reset_best_scores(trainer: pl.Trainer) -> list[str]:
    """Reset the best score of every ModelCheckpoint that monitors a metric and of every EarlyStopping.

    After a cut, scores from before it belong to another network and must not be compared with later ones.

    Returns:
        The paths of the files that were the best until now.
    """
    outdated = []
    for checkpoint in callbacks_of(trainer, ModelCheckpoint):
        if checkpoint.monitor is not None:
            if checkpoint.best_model_path:
                outdated.append(checkpoint.best_model_path)
            checkpoint.best_k_models = {}
            checkpoint.kth_best_model_path = ""
            checkpoint.best_model_score = None
            checkpoint.best_model_path = ""
            checkpoint.kth_value = _worst_score(checkpoint.mode)
    for stopping in callbacks_of(trainer, EarlyStopping):
        stopping.wait_count = 0
        stopping.best_score = _worst_score(stopping.mode)
    return outdated


def _worst_score(mode: str) -> Tensor:
    """Return the score that every other score improves on."""
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)

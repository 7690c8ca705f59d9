"""The best checkpoints and scores that callbacks of Lightning remember."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gflow_pl.callbacks.lightning.packages import callbacks_of
from gflow_pl.common.lightning_package import pl

__all__ = ["BestAfterCuts"]


class BestAfterCuts:
    """Makes other callbacks forget what was best before the last cut: it belongs to another network.

    A ModelCheckpoint that monitors no metric treats its newest file as the best one. It may save again between a cut
    and the end of training, or not: only at the end is it known whether its file is from before the last cut.
    """

    def __init__(self) -> None:
        self._steps_at_cut: dict[pl.callbacks.ModelCheckpoint, int] = {}

    def reset(self, trainer: pl.Trainer) -> None:
        """Reset the best scores of callbacks that monitor a metric. Call this after a cut."""
        for checkpoint in callbacks_of(trainer, pl.callbacks.ModelCheckpoint):
            if checkpoint.monitor is not None:
                if checkpoint.best_model_path:
                    _report_outdated(checkpoint.best_model_path)
                checkpoint.best_k_models = {}
                checkpoint.kth_best_model_path = ""
                checkpoint.best_model_score = None
                checkpoint.best_model_path = ""
                checkpoint.kth_value = _worst_score(checkpoint.mode)
        for stopping in callbacks_of(trainer, pl.callbacks.EarlyStopping):
            stopping.wait_count = 0
            stopping.best_score = _worst_score(stopping.mode)
        self._steps_at_cut = _last_saved_steps(trainer)

    def forget_outdated_files(self, trainer: pl.Trainer) -> None:
        """Clear the best file of a ModelCheckpoint that has not saved since the last cut.

        Call this when training ends.
        """
        steps = _last_saved_steps(trainer)
        for checkpoint, step in self._steps_at_cut.items():
            if steps.get(checkpoint) == step:
                _report_outdated(checkpoint.best_model_path)
                checkpoint.best_model_path = ""
        self._steps_at_cut = {}


def _last_saved_steps(trainer: pl.Trainer) -> dict[pl.callbacks.ModelCheckpoint, int]:
    """Return the global step of the last save of every ModelCheckpoint that monitors no metric and has saved a file."""
    return {
        # Private; without it a file from before the last cut would be reported as best.
        checkpoint: checkpoint._last_global_step_saved
        for checkpoint in callbacks_of(trainer, pl.callbacks.ModelCheckpoint)
        if checkpoint.monitor is None and checkpoint.best_model_path
    }


def _report_outdated(path: str) -> None:
    pl.utilities.rank_zero_info(
        f"'{os.path.basename(path)}' is of the network before the last cut and does not count as best."
    )


def _worst_score(mode: str) -> Tensor:
    """Return the score that every other score improves on."""
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)

"""The files of a run's folder: metrics.csv with one row for each epoch, the best and the last checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from gflow_pl.callbacks.lightning.packages import Callback
from gflow_pl.callbacks.pruning import find_pruning_callback
from gflow_pl.common.checkpoint_file import read_checkpoint
from gflow_pl.common.lightning_package import pl
from gflow_pl.files import write_bytes, write_rows

__all__ = ["BestCheckpoint", "LastCheckpoint", "RunRecorder"]

_METRIC_COLUMNS = (
    "epoch",
    "phase",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "lr",
    "filters",
)


class RunRecorder(Callback):
    """Record one row for every training epoch, and write all rows to ``metrics.csv`` after each epoch.

    A PruningCallback writes the rows of its rounds into the same folder. The rows of the epochs are in the recorder's
    state, so a resumed run continues those of its parent. Test columns hold the metrics of the validation loader, which
    is the test set unless the data module keeps a share of the training set for validation.

    Args:
        folder: The run's folder.
        prints_epochs: Whether to print a line for each epoch, for output that cannot show a progress bar.

    Attributes:
        rows: One row for each epoch, by column.
    """

    def __init__(self, folder: str | os.PathLike[str], prints_epochs: bool = False) -> None:
        self.folder = Path(folder)
        self.prints_epochs = prints_epochs
        self.rows: list[dict[str, Any]] = []
        self._lr: float | None = None

    @property
    def path(self) -> Path:
        """Path of metrics.csv."""
        return self.folder / "metrics.csv"

    @property
    def rounds_folder(self) -> Path:
        """Folder in which a `PruningCallback` writes the rows of its rounds."""
        return self.folder

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the learning rate of the epoch."""
        groups = [group for optimizer in trainer.strategy.optimizers for group in optimizer.param_groups]
        self._lr = float(groups[0]["lr"]) if groups else None

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the row of the epoch, and write all rows."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        pruning = find_pruning_callback(trainer)
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "phase": pruning.phase(trainer.current_epoch) if pruning else "final",
            "lr": pruning.held_lr if pruning and pruning.held_lr else self._lr,
            "filters": pruning.num_filters if pruning else None,
        }
        for name, value in metrics.items():
            row[name.replace("val_", "test_", 1) if name.startswith("val_") else name] = value
        self.rows = [old for old in self.rows if old["epoch"] != row["epoch"]] + [row]
        if trainer.is_global_zero:
            if self.prints_epochs:
                print(_line(row, trainer.max_epochs), flush=True)
            write_rows(self.path, self.rows, _METRIC_COLUMNS)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far."""
        return {"rows": [dict(row) for row in self.rows]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows of the run that is resumed."""
        self.rows = [dict(row) for row in state_dict["rows"]]


class BestCheckpoint(pl.callbacks.ModelCheckpoint):
    """Save the epoch with the best validation accuracy, among those after the last pruning round, as ``best.ckpt``.

    Args:
        folder: The run's folder.
        monitor: Name of the metric; higher = better.
    """

    def __init__(self, folder: str | os.PathLike[str], monitor: str = "val_accuracy") -> None:
        super().__init__(
            dirpath=Path(folder), filename="best", monitor=monitor, mode="max", enable_version_counter=False
        )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after validation, once the network has its final shape."""
        if _has_final_shape(trainer):
            super().on_validation_end(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of an epoch, once the network has its final shape."""
        if _has_final_shape(trainer) and self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the best epoch of the run that is resumed, and copy its file into this run's folder.

        If that file is missing, or of a later epoch than the checkpoint, the best epoch is determined anew.
        """
        score, file = state_dict["best_model_score"], Path(state_dict["best_model_path"])
        if score is None or not self._is_file_of(file, score):
            return
        assert self.dirpath is not None
        own = Path(self.dirpath) / f"best{self.FILE_EXTENSION}"
        if file != own:
            pl.utilities.rank_zero_only(write_bytes)(own, file.read_bytes())
        self.best_model_path = self.kth_best_model_path = str(own)
        self.best_model_score = self.kth_value = score
        self.best_k_models = {str(own): score}

    def _is_file_of(self, file: Path, score: Tensor) -> bool:
        """Return whether a file exists and is the checkpoint that was saved as the best, with this score."""
        if not file.is_file():
            return False
        try:
            state = read_checkpoint(file)["callbacks"][self.state_key]
            return bool(state["best_model_score"] == score.cpu())
        except Exception:  # a damaged file may raise anything, and is not the best epoch's
            return False


class LastCheckpoint(pl.callbacks.ModelCheckpoint):
    """Save the last finished epoch as ``last.ckpt``, regardless of its metrics: the file to resume a run from.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(
            dirpath=Path(folder),
            filename="last",
            monitor=None,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    @property
    @override
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints, different from that of a ModelCheckpoint."""
        return "LastCheckpoint"


def _line(row: dict[str, Any], max_epochs: int | None) -> str:
    """Return one line about an epoch, counted from 0.

    For example: "epoch 2/13 (pruning): train 90.71%, test 88.73%, lr 0.05, 1330 filters".
    """
    total = f"/{max_epochs - 1}" if max_epochs is not None and max_epochs > 0 else ""
    parts = [
        f"{part} {row[f'{part}_accuracy']:.2%}" for part in ("train", "test") if row.get(f"{part}_accuracy") is not None
    ]
    parts += [f"lr {row['lr']:g}"] * (row["lr"] is not None) + [f"{row['filters']} filters"] * bool(row["filters"])
    return f"epoch {row['epoch']}{total} ({row['phase']}): {', '.join(parts)}"


def _has_final_shape(trainer: pl.Trainer) -> bool:
    pruning = find_pruning_callback(trainer)
    return pruning is None or pruning.finished

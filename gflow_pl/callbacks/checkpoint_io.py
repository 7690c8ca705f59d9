"""Checkpoints that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.io import TorchCheckpointIO
from typing_extensions import override

from gflow_pl.files import atomic_save

__all__ = ["AtomicCheckpointIO", "use_atomic_files"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, syncs it to the disk and renames it over the target.

    Lightning's own writes into the temporary folder and moves the file: where that folder is on another file system the
    move is a copy, and a process killed meanwhile leaves a torn checkpoint. Remote paths (``s3://...``) are Lightning's.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves a checkpoint.

        Args:
            checkpoint: The contents.
            path: The target.
            storage_options: For remote paths only.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            atomic_save(checkpoint, path)


def use_atomic_files(trainer: pl.Trainer) -> None:
    """Put `AtomicCheckpointIO` in the place of Lightning's default; a CheckpointIO that somebody chose stays."""
    strategy = trainer.strategy
    # By name: the default of the twin package `lightning` is a class of its own.
    if type(strategy.checkpoint_io).__name__ == TorchCheckpointIO.__name__:
        strategy.checkpoint_io = AtomicCheckpointIO()

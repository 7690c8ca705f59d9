"""The Trainer of the commands. The parameters and docstring of a method are the options and help of a command."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import _PREDICT_OUTPUT

__all__ = ["TRAINING_COMMANDS", "GflowTrainer"]

TRAINING_COMMANDS = ("fit", "prune", "finetune")
"""Commands that train: they write checkpoints, metrics and logs."""


class GflowTrainer(pl.Trainer):
    """A Lightning Trainer with the additional commands `prune` and `finetune`."""

    def fit(  # type: ignore[override]
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        pretrained: str | None = None,
    ) -> None:
        """Train a network.

        Args:
            model: The module to train.
            datamodule: The data.
            ckpt_path: Checkpoint of a run to resume, with its optimizer, epoch and metrics.
            pretrained: File to start from. Only its weights and its shape are used.
        """
        super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

    def prune(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        pretrained: str | None = None,
    ) -> None:
        """Train a network, prune its filters over several rounds, and continue training.

        Args:
            model: The module to train and prune.
            datamodule: The data.
            ckpt_path: Checkpoint of a pruning run to resume, with its optimizer, epoch, rounds and metrics.
            pretrained: File to start from. Only its weights and its shape are used.
        """
        self.fit(model, datamodule, ckpt_path)

    def finetune(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        pretrained: str | None = None,
    ) -> None:
        """Train a pruned network from a file further, with a new optimizer.

        Training starts at epoch 0, and the network keeps its pruned shape.

        Args:
            model: The module to train.
            datamodule: The data.
            pretrained: File to start from. Only its weights and its shape are used.
        """
        self.fit(model, datamodule)

    def validate(  # type: ignore[override]
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        pretrained: str | None = None,
    ) -> Any:
        """Measure a checkpoint on the validation data.

        Args:
            model: The module.
            datamodule: The data.
            ckpt_path: Checkpoint to measure.
            pretrained: File to measure, which need not be a Lightning checkpoint.
        """
        return super().validate(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

    def test(  # type: ignore[override]
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        pretrained: str | None = None,
        base: str | None = None,
        counts_only: bool = False,
        dataloaders: Any = None,
    ) -> Any:
        """Report accuracy, multiply-accumulates, FLOPs, parameters and compression of a checkpoint.

        Args:
            model: The module.
            datamodule: The data.
            ckpt_path: Checkpoint to report on.
            pretrained: File to report on, which may be a file of the published code.
            base: File of the unpruned network, whose accuracy is then measured as well.
            counts_only: Whether to report the size only, without reading data.
            dataloaders: Loaders that replace the data.
        """
        return super().test(
            model, dataloaders=dataloaders, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True, verbose=False
        )

    def predict(  # type: ignore[override]
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        pretrained: str | None = None,
    ) -> _PREDICT_OUTPUT | None:
        """Write the class and its probability for every image to predictions.csv.

        Args:
            model: The module.
            datamodule: The data.
            ckpt_path: Checkpoint to predict with.
            pretrained: File to predict with, which need not be a Lightning checkpoint.
        """
        return super().predict(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

"""The Trainer behind the commands; its methods' signatures are the commands' options."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import _PREDICT_OUTPUT

__all__ = ["GflowTrainer"]


class GflowTrainer(pl.Trainer):
    """A Lightning Trainer with the further commands `prune` and `finetune`."""

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
            ckpt_path: Checkpoint of a run to resume: weights, optimizer, epoch, rows and all.
            pretrained: File to start from, for its weights and its shape only.
        """
        super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

    def prune(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        pretrained: str | None = None,
    ) -> None:
        """Train a network, prune its filters over rounds, train on.

        Args:
            model: The module to train and prune.
            datamodule: The data.
            ckpt_path: Checkpoint of a pruning run to resume: weights, optimizer, epoch, rounds, rows and all.
            pretrained: File to start from, for its weights and its shape only.
        """
        self.fit(model, datamodule, ckpt_path)

    def finetune(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        pretrained: str | None = None,
    ) -> None:
        """Train on from a pruned file: epoch 0, fresh optimizer, pruned shape kept.

        Args:
            model: The module to train.
            datamodule: The data.
            pretrained: File to start from, for its weights and its shape.
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
            pretrained: The same, also for files that are no Lightning checkpoints.
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
            pretrained: The same, also for files of the published code.
            base: File of the unpruned network, to measure its accuracy too.
            counts_only: Only count; no data is read.
            dataloaders: Loaders in place of the data.
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
            pretrained: The same, also for files that are no Lightning checkpoints.
        """
        return super().predict(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

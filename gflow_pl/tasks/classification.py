"""Image classification: the task of the paper."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from gflow_pl.surgery import StructureMixin
from gflow_pl.tasks.network import build_network, hyper_parameter
from gflow_pl.tasks.pretrained import load_pretrained

__all__ = ["ImageClassifier"]


class ImageClassifier(StructureMixin, pl.LightningModule):
    """Trains a network to tell images apart, as the paper does: SGD with a rate that falls in two steps.

    The loss is the cross-entropy of ``logits / temperature``. Logs, once an epoch, `train_loss`, `train_accuracy`,
    `val_loss`, `val_accuracy`, and `test_loss`, `test_accuracy`.

    Args:
        network: A network of ours by name (vgg13, mobilenet_v1, resnet56, resnet34, resnet18), any other by
            ``class_path`` and ``init_args``, or, in Python, a module (to be handed over again when a checkpoint is loaded).
        num_classes: Classes; the commands take it from the data.
        temperature: Divides the logits in the loss, > 0; 1 is the ordinary loss (the paper trains with 5).
        lr: Learning rate of the first stage, > 0.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: Weight decay of SGD, >= 0.
        nesterov: Whether the momentum is Nesterov's.
        milestones: Epochs, counted from 0, at which the learning rate is multiplied by `lr_factor`; warm-up and
            pruning rounds belong to the first stage.
        lr_factor: What the learning rate is multiplied by at each milestone, > 0.
        pretrained: A file to start from, for its weights and its shape only: a checkpoint of ours, pruned or not, or
            a file of the published code. It is not kept in the hyper-parameters.

    Raises:
        ValueError: A setting is out of range, or the network or the file does not fit.

    Example:
        >>> classifier = ImageClassifier("vgg13", num_classes=10)
        >>> classifier(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module = "resnet56",
        num_classes: int = 10,
        temperature: float = 5.0,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        milestones: list[int] = [80, 120],  # noqa: B006 - read only; a tuple would not be a YAML list
        lr_factor: float = 0.1,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        _check_settings(num_classes, temperature, lr, momentum, weight_decay, nesterov, milestones, lr_factor)
        self.save_hyperparameters(ignore=["network", "pretrained"])
        self.save_hyperparameters({"network": hyper_parameter(network)})
        self.network = build_network(network, num_classes)
        self.temperature = temperature
        metrics: dict[str, Any] = {"num_classes": num_classes, "average": "micro", "validate_args": False}
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (MulticlassAccuracy(**metrics) for _ in range(3))
        # "disable": looking for NaN in every batch would wait for the device.
        self.train_loss, self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(3))
        if pretrained is not None:
            load_pretrained(self, pretrained)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Logits (examples, classes) of images (examples, channels, height, width)."""
        return self.network(images)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch of images and labels."""
        loss = self._step("train", batch)
        if self._is_last_batch():
            self._log_epoch("train")
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self._step("val", batch)

    @override
    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self._log_epoch("val")

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds a batch to the test metrics."""
        self._step("test", batch)

    @override
    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self._log_epoch("test")

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (examples, classes) of a batch of images, or of images and labels."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self(images).softmax(dim=1)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD and its two steps down."""
        hp: Any = self.hparams
        optimizer = torch.optim.SGD(
            self.parameters(), lr=hp.lr, momentum=hp.momentum, weight_decay=hp.weight_decay, nesterov=hp.nesterov
        )
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=list(hp.milestones), gamma=hp.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def _is_last_batch(self) -> bool:
        try:
            return self.trainer.is_last_batch
        except RuntimeError:  # raised by Lightning where no Trainer is attached
            return False

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits / self.temperature, labels)
        # Accumulated on the device and logged once an epoch: logging every step costs more than a small step itself.
        getattr(self, f"{stage}_accuracy").update(logits.detach(), labels)
        # A plain number would be copied to the device, and the copy waited for.
        number = torch.full((), len(labels), dtype=torch.float32, device=loss.device)
        getattr(self, f"{stage}_loss").update(loss.detach(), weight=number)
        return loss

    def _log_epoch(self, stage: str) -> None:
        for name in (f"{stage}_loss", f"{stage}_accuracy"):
            self.log(name, getattr(self, name), on_step=False, on_epoch=True, prog_bar=name != "train_loss")


def _check_settings(
    num_classes: int,
    temperature: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    milestones: list[int],
    lr_factor: float,
) -> None:
    rules = [
        (num_classes >= 2, f"`num_classes` must be at least 2, got {num_classes}."),
        (temperature > 0, f"`temperature` must be > 0, got {temperature}."),
        (lr > 0, f"`lr` must be > 0, got {lr}."),
        (0 <= momentum < 1, f"`momentum` must be in [0, 1), got {momentum}."),
        (weight_decay >= 0, f"`weight_decay` must be >= 0, got {weight_decay}."),
        (not nesterov or momentum > 0, "`nesterov` needs a `momentum` > 0."),
        (lr_factor > 0, f"`lr_factor` must be > 0, got {lr_factor}."),
        (
            list(milestones) == sorted(set(milestones)) and all(m >= 0 for m in milestones),
            f"`milestones` must be ascending epochs >= 0, got {list(milestones)}.",
        ),
    ]
    for holds, sentence in rules:
        if not holds:
            raise ValueError(sentence)

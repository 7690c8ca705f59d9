"""A LightningModule for image classification, the task of the paper."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import pl
from gflow_pl.surgery import StructureMixin
from gflow_pl.tasks.network import build_network, network_hyperparameter
from gflow_pl.tasks.pretrained import load_pretrained

__all__ = ["ImageClassifier"]


class ImageClassifier(StructureMixin, pl.LightningModule):
    """Train a network to classify images with SGD and a learning rate that decreases in steps, as in the paper.

    The loss is the cross-entropy of ``logits / temperature``. `train_loss`, `train_accuracy`, `val_loss`,
    `val_accuracy`, `test_loss` and `test_accuracy` are logged once per epoch.

    Args:
        network: The name of a network of this package (vgg13, mobilenet_v1, resnet56, resnet34, resnet18), the
            ``class_path`` and ``init_args`` of any other network, or, in Python, a module. A module must be passed
            again when a checkpoint is loaded.
        num_classes: Number of classes, at least 2. The commands take it from the data.
        temperature: The logits are divided by this number in the loss, > 0. The paper trains with 5.
        lr: Initial learning rate, > 0.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: Weight decay of SGD, >= 0.
        nesterov: Whether to use Nesterov momentum.
        milestones: Epochs, counted from 0, at which the learning rate is multiplied by `lr_factor`. Warm-up and pruning
            rounds usually end before the first milestone.
        lr_factor: Factor of the learning rate at each milestone, > 0.
        pretrained: File to start from, of which only the weights and the shape are used: a checkpoint, pruned or not,
            or a file of the published code. It is not stored in the hyperparameters.

    Raises:
        SettingsError: A setting is out of range, or the network or the file does not fit.

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
        self.save_hyperparameters({"network": network_hyperparameter(network)})
        self.network = build_network(network, num_classes)
        self.temperature = temperature
        metrics: dict[str, Any] = {"num_classes": num_classes, "average": "micro", "validate_args": False}
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (MulticlassAccuracy(**metrics) for _ in range(3))
        # "disable", because a check for NaN in every batch would synchronize with the device.
        self.train_loss, self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(3))
        if pretrained is not None:
            load_pretrained(self, pretrained)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (images, classes) of images (images, channels, height, width)."""
        return self.network(images)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images and labels."""
        loss = self._step("train", batch)
        if self._is_last_batch():
            self._log_epoch("train")
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self._step("val", batch)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_epoch("val")

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        self._step("test", batch)

    @override
    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_epoch("test")

    @override
    def predict_step(self, batch: Tensor | list[Tensor] | tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the class probabilities (images, classes) of a batch of images, or of images and labels."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self(images).softmax(dim=1)

    @override
    def configure_optimizers(self) -> pl.utilities.types.OptimizerLRScheduler:
        """Return SGD, and a schedule that reduces the learning rate at the milestones."""
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
        """Return the loss of a batch, and add the batch to the metrics of a stage ("train", "val" or "test")."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits / self.temperature, labels)
        # Accumulate on the device and log once per epoch: logging costs more than the step of a small network.
        getattr(self, f"{stage}_accuracy").update(logits.detach(), labels)
        # The weight is created on the device, because copying a Python number there would synchronize.
        num_images = torch.full((), len(labels), dtype=torch.float32, device=loss.device)
        getattr(self, f"{stage}_loss").update(loss.detach(), weight=num_images)
        return loss

    def _log_epoch(self, stage: str) -> None:
        """Log the metrics of a stage."""
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
    """Raise a SettingsError for the first setting that is out of range."""
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
    for is_met, sentence in rules:
        if not is_met:
            raise SettingsError(sentence)

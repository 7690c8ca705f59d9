"""Prune a custom module with Adam and a scheduler: with one callback, the network shrinks while it trains.

python examples/plain_module.py
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

import gflow_pl


class DigitReader(pl.LightningModule):
    """A classifier of digits, without any code for pruning."""

    def __init__(self, width: int = 16, lr: float = 2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(2 * width * 16, 2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        return self.head(F.relu(self.hidden(self.features(x))))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)]


def main(data=None, folder="checkpoints/plain_module", max_epochs=8):
    """Train, prune in two rounds (before epochs 1 and 2), continue training, save."""
    pruning = gflow_pl.PruningCallback("biased_loss", fraction=0.6, rounds=2, num_samples=512, keep_momentum=True)
    monitor = gflow_pl.GradientFlowMonitor(per_layer=False)

    trainer = pl.Trainer(max_epochs=max_epochs, callbacks=[pruning, monitor], default_root_dir=folder)
    module = DigitReader()
    trainer.fit(module, data or gflow_pl.data.Digits(batch_size=32))

    for row in pruning.rows:
        print(f"round {row['round']}: {row['filters_left']} filters, {row['parameters']:,} parameters")
    for row in monitor.rows:
        print(f"epoch {row['epoch']}: |theta| {row['parameter_norm']:.3f}, theta.g {row['theta_g']:+.5f}")

    # The file contains its shape: the module is built at full size and takes that shape before its weights are loaded.
    path = Path(folder) / "pruned.ckpt"
    trainer.save_checkpoint(path)
    smaller = gflow_pl.load_from_checkpoint(DigitReader, path)
    print(f"{path}: {sum(p.numel() for p in smaller.parameters()):,} parameters")
    return module


if __name__ == "__main__":
    main()

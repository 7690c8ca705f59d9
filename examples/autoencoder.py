"""Prune an autoencoder by the change of the gradient's norm (grasp). Its loss needs no labels.

`grasp` divides logits by a temperature. This module has no logits, so its own loss is used, and the log says so.

python examples/autoencoder.py
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

import gflow_pl


class Autoencoder(pl.LightningModule):
    """An encoder of convolutions and a decoder of transposed convolutions."""

    def __init__(self, width: int = 8, code: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * width, code, 3, stride=2, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(code, 2 * width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
        )

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        loss = F.mse_loss(self(batch[0]), batch[0])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(data=None, folder="checkpoints/autoencoder", max_epochs=4, measure="grasp"):
    """Remove a third of the filters in two rounds. The code keeps its width."""
    pruning = gflow_pl.PruningCallback(measure, fraction=0.33, rounds=2, num_samples=256, ignore=["encoder.4"])
    trainer = pl.Trainer(max_epochs=max_epochs, callbacks=[pruning], default_root_dir=folder)
    module = Autoencoder()
    trainer.fit(module, data or gflow_pl.data.Digits())
    trainer.save_checkpoint(Path(folder) / "pruned.ckpt")
    return module


if __name__ == "__main__":
    main()

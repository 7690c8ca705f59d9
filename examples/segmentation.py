"""Prune a network like U-Net with a custom loss. Scores come from the gradients of the module's `training_step`.

The masks are the pixels brighter than the mean of the image. Because the class derives from `StructureMixin`, its own
`load_from_checkpoint` loads pruned files.

python examples/segmentation.py
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

import gflow_pl


def block(channels_in, channels_out):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class UNet(gflow_pl.StructureMixin, pl.LightningModule):
    """An encoder and a decoder at two scales, connected by concatenation."""

    def __init__(self, width: int = 8, dice_weight: float = 0.5):
        super().__init__()
        self.save_hyperparameters()
        self.top, self.middle, self.bottom = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up_middle = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.from_middle = block(4 * width, 2 * width)
        self.up_top = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.from_top = block(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        top = self.top(x)
        middle = self.middle(F.max_pool2d(top, 2))
        bottom = self.bottom(F.max_pool2d(middle, 2))
        middle = self.from_middle(torch.cat([middle, self.up_middle(bottom)], dim=1))
        return self.head(self.from_top(torch.cat([top, self.up_top(middle)], dim=1)))

    @staticmethod
    def masks_of(images):
        grey = images.mean(1, keepdim=True)
        return (grey > grey.mean((2, 3), keepdim=True)).float()

    def training_step(self, batch, batch_idx):
        images = batch[0]
        masks, logits = self.masks_of(images), self(images)
        probabilities = logits.sigmoid()
        overlap = 2 * (probabilities * masks).sum((1, 2, 3)) / (probabilities + masks).sum((1, 2, 3)).clamp(min=1)
        weight = self.hparams.dice_weight
        loss = (1 - weight) * F.binary_cross_entropy_with_logits(logits, masks) + weight * (1 - overlap.mean())
        self.log_dict({"loss": loss, "dice": overlap.mean()}, prog_bar=True)
        return {"loss": loss}

    def configure_optimizers(self):
        optimizer = torch.optim.RMSprop(self.parameters(), lr=1e-3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}


def main(data=None, folder="checkpoints/segmentation", max_epochs=4):
    """Remove half of the filters in two rounds, by the change of the loss."""
    pruning = gflow_pl.PruningCallback("loss", fraction=0.5, rounds=2, num_samples=256)
    trainer = pl.Trainer(max_epochs=max_epochs, callbacks=[pruning], default_root_dir=folder)
    module = UNet()
    trainer.fit(module, data or gflow_pl.data.Digits(val_fraction=0.1))
    path = Path(folder) / "pruned.ckpt"
    trainer.save_checkpoint(path)
    smaller = UNet.load_from_checkpoint(path, weights_only=True)
    print(f"{path}: {sum(p.numel() for p in smaller.parameters()):,} parameters")
    return module


if __name__ == "__main__":
    main()

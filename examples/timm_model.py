"""Prune a timm network to a share of its multiply-accumulates.

pip install timm
python examples/timm_model.py
"""

from pathlib import Path

import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F

import gflow_pl


class TimmClassifier(pl.LightningModule):
    """A classifier of timm, chosen by name."""

    def __init__(self, name: str = "resnet10t", num_classes: int = 10, pretrained: bool = False):
        super().__init__()
        self.save_hyperparameters()
        self.network = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)


def main(name="resnet10t", data=None, folder="checkpoints/timm_model", max_epochs=4):
    """Remove half of the multiply-accumulates in two rounds."""
    pruning = gflow_pl.PruningCallback("l1", fraction=0.5, rounds=2, target="macs", residual="remove", num_samples=128)
    trainer = pl.Trainer(max_epochs=max_epochs, callbacks=[pruning], default_root_dir=folder)
    module = TimmClassifier(name)
    trainer.fit(module, data or gflow_pl.data.Digits())
    for row in pruning.rows:
        print(f"round {row['round']}: {row['macs']:,} multiply-accumulates")
    trainer.save_checkpoint(Path(folder) / "pruned.ckpt")
    return module


if __name__ == "__main__":
    main()

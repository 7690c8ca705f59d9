"""Fine-tune and prune a torchvision classifier: ResNet-18, MobileNetV3, or any other by name.

python examples/torchvision_finetuning.py resnet18
python examples/torchvision_finetuning.py mobilenet_v3_small
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import gflow_pl


class FineTuner(pl.LightningModule):
    """A torchvision network with a new last layer.

    `weights` is a name of trained weights in torchvision ("DEFAULT" downloads the best); None trains from scratch.
    Load a checkpoint with ``weights=None``: it contains the weights.
    """

    def __init__(self, name: str = "resnet18", num_classes: int = 10, weights: str | None = None, lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters(ignore=["weights"])
        self.network = torchvision.models.get_model(name, weights=weights)
        last, layer = [(n, m) for n, m in self.network.named_modules() if isinstance(m, nn.Linear)][-1]
        parent = self.network.get_submodule(last.rpartition(".")[0])
        setattr(parent, last.rpartition(".")[2], nn.Linear(layer.in_features, num_classes))

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, nesterov=True)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[5], gamma=0.1)]


def main(name="resnet18", data=None, folder="checkpoints/torchvision", max_epochs=6, weights=None):
    """Prune before the first step and again two epochs later, as suits a network that is already trained."""
    pruning = gflow_pl.PruningCallback(
        measure="tfo",
        thresholds=[0.2, 0.4],
        epochs=[0, 2],
        num_samples=256,
        residual="remove",  # residual streams become narrower as well, which saves the most time
        min_kept=0.1,
    )
    trainer = pl.Trainer(max_epochs=max_epochs, callbacks=[pruning], default_root_dir=folder)
    module = FineTuner(name, weights=weights)
    before = sum(p.numel() for p in module.parameters())
    trainer.fit(module, data or gflow_pl.data.Digits())
    print(f"{before:,} -> {pruning.rows[-1]['parameters']:,} parameters")
    trainer.save_checkpoint(Path(folder) / "pruned.ckpt")
    return module


if __name__ == "__main__":
    main(*sys.argv[1:2])

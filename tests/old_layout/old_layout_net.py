"""The network, the data and the two runs whose files were written before the package had its present rooms.

Everything is seeded: the data, the order of each epoch and the initial weights.
"""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from gflow_pl import PruningCallback

WIDTH = 8
RUNS = {
    # Round 1 at the start of epoch 1, round 2 at the start of epoch 3; the file is of the end of epoch 1.
    "last": ("SGD", {"measure": "magnitude", "keep_momentum": True}),
    "tracked": ("Adam", {"measure": "biased_loss_tracked", "bias": "distance_from_init", "track_batches": 2}),
}


class TinyNet(nn.Module):
    """A stem, a residual block and a head: conv1 is a "remove" group, conv2 and the stem are "expand" groups."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.conv1 = nn.Conv2d(WIDTH, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, WIDTH, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


class TinyModule(pl.LightningModule):
    def __init__(self, optimizer="SGD"):
        super().__init__()
        self.save_hyperparameters()
        self.net = TinyNet()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        if self.hparams.optimizer == "Adam":
            return torch.optim.Adam(self.parameters(), lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class EpochOrder(Sampler):
    """A permutation that depends on the epoch only."""

    def __init__(self, length):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(torch.randperm(self.length, generator=torch.Generator().manual_seed(100 + self.epoch)).tolist())


def loader():
    """Return 48 images 3x8x8 of four classes in batches of 16."""
    labels = torch.arange(48) % 4
    images = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(11)) + 0.5 * labels[:, None, None, None]
    dataset = TensorDataset(images, labels)
    return DataLoader(dataset, batch_size=16, sampler=EpochOrder(len(dataset)))


def fit(name, folder, ckpt_path=None):
    """Train the run of that name for five epochs, from the beginning or from a checkpoint."""
    optimizer, options = RUNS[name]
    torch.manual_seed(3 if ckpt_path is None else 77)
    module = TinyModule(optimizer)
    options = {"fraction": 0.5, "rounds": 2, "epochs": [1, 3], "num_samples": 48, "protect_stem": False, **options}
    pruning = PruningCallback(evaluate_cuts=False, **options)
    trainer = pl.Trainer(
        max_epochs=5,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        default_root_dir=str(folder),
        callbacks=[pruning],
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)
    return module, pruning

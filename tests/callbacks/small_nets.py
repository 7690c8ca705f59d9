"""Small modules and data for the tests of callbacks."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset


class Block(nn.Module):
    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def small_net(width: int = 8, *, norm: bool = True, dropout: float = 0.0) -> nn.Sequential:
    """Return a stem, a residual block, a conv and a linear layer, for 3x8x8 images of 4 classes."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width) if norm else nn.Identity(),
        nn.ReLU(),
        Block(width, norm),
        nn.Conv2d(width, 12, 3, stride=2),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


class SmallModule(pl.LightningModule):
    """A user's module, without any code for pruning."""

    def __init__(self, optimizer: str = "SGD", norm: bool = True, dropout: float = 0.0, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = small_net(norm=norm, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = {
            "SGD": lambda p: torch.optim.SGD(p, lr=self.hparams.lr, momentum=0.9),
            "AdamW": lambda p: torch.optim.AdamW(p, lr=self.hparams.lr / 10),
        }[self.hparams.optimizer](self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)]


def images(number: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> TensorDataset:
    """Return random images whose class can be learned from their brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 4
    x = torch.randn(number, 3, 8, 8, generator=generator, dtype=dtype) + 0.5 * labels[:, None, None, None]
    return TensorDataset(x, labels)


class GlobalOrder(Sampler[int]):
    """One rank's share of a random order, which is the same on all ranks and changes with each epoch."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.rank, self.world_size, self.epoch = length, rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world_size

    def __iter__(self):
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(100 + self.epoch)).tolist()
        return iter(order[self.rank :: self.world_size])


def loader(dataset: TensorDataset, batch_size: int = 16, *, rank: int = 0, world_size: int = 1) -> DataLoader:
    return DataLoader(dataset, batch_size=batch_size, sampler=GlobalOrder(len(dataset), rank, world_size))


def trainer(folder, **options) -> pl.Trainer:
    """Return a Trainer on the CPU that prints nothing and writes only into `folder`."""
    settings = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**settings, **options})

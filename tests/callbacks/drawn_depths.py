"""Train a network of random depth on two ranks whose generators differ; run by test_callbacks_drawn_depths.py.

python drawn_depths.py FOLDER
"""

import os
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from small_nets import trainer
from torch import nn
from torch.utils.data import DataLoader

from gflow_pl import PruningCallback


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class RandomDepth(pl.LightningModule):
    """Every block is skipped now and then, on each rank at other times, and the forward looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.stem, self.head = nn.Linear(12, 16), nn.Linear(8, 12), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        x = self.inner(self.stem(x).relu())
        if bool(x.isnan().any()):
            raise ValueError("not a number")
        for block in self.blocks:
            if self.training and torch.rand([]) < 0.4:
                continue
            x = block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    pl.seed_everything(0)
    module = RandomDepth()
    pl.seed_everything(10 + int(os.environ.get("LOCAL_RANK", 0)))
    callback = PruningCallback("loss", fraction=0.3, rounds=2, num_samples=16)
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    run = trainer(folder, max_epochs=3, callbacks=[callback], devices=2, strategy=strategy)
    run.fit(module, DataLoader(torch.randn(64, 8), batch_size=8))
    assert callback.graph is not None
    kept = {group.name: list(group.kept) for group in callback.graph.groups}
    torch.save({"kept": kept, "parameters": dict(module.named_parameters())}, folder / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main()

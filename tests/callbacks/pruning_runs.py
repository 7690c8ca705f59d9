"""A training run with two rounds of pruning, for tests of data, loaders and loggers."""

import pytorch_lightning as pl
from small_nets import SmallModule, trainer

from gflow_pl import PruningCallback


def prune(folder, data, module=None, val=None, **options) -> tuple[pl.LightningModule, PruningCallback]:
    """Train for four epochs with two rounds of pruning."""
    pl.seed_everything(0)
    module = module or SmallModule(dropout=0.2)
    settings = {"measure": "loss", "fraction": 0.5, "rounds": 2, "num_samples": 32}
    pruning = PruningCallback(**{**settings, **options})
    trainer(folder, callbacks=[pruning]).fit(module, data, val)
    return module, pruning

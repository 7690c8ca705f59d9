"""Accuracy by several processes: every image counts alike, whatever data module and module they are of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from gflow_pl.callbacks.lightning.loaders import has_length, loader_like
from gflow_pl.data.unrepeated_sampler import UnrepeatedSampler

__all__ = ["undivided_test_images"]


@contextmanager
def undivided_test_images(data: pl.LightningDataModule, trainer: pl.Trainer) -> Iterator[None]:
    """Within, every process measures all test images, where the data module leaves their division to Lightning.

    Lightning repeats images to make the shares equal, and they would count twice. Shares that are not equal are no way
    out: its averages over ranks take whole numbers of images for their mean, and a module that does not ask for an
    average logs that of its share. Data modules that divide the images themselves (ours) are left alone.
    """
    if trainer.world_size == 1:
        yield
        return
    theirs = data.test_dataloader

    def test_dataloader() -> Any:
        loader = theirs()
        if not _is_divided_by_lightning(loader):
            return loader
        # A DistributedSampler is what Lightning does not replace; this one is of one process.
        sampler = UnrepeatedSampler(loader.dataset, num_ranks=1, rank=0)
        return loader_like(loader, batch_size=loader.batch_size, sampler=sampler, drop_last=loader.drop_last)

    data.__dict__["test_dataloader"] = test_dataloader
    try:
        yield
    finally:
        del data.__dict__["test_dataloader"]


def _is_divided_by_lightning(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and has_length(loader)
        and type(loader.sampler) in (SequentialSampler, RandomSampler)
        and type(loader.batch_sampler) is BatchSampler
    )

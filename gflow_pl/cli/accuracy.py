"""Measure the accuracy of a module, with every test image counted once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytorch_lightning as pl
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from gflow_pl.callbacks.lightning.loaders import has_length, loader_like
from gflow_pl.data.unrepeated_sampler import UnrepeatedSampler

__all__ = ["measure_accuracies"]


def measure_accuracies(
    trainer: pl.Trainer, module: pl.LightningModule, datamodule: pl.LightningDataModule
) -> dict[str, float | None]:
    """Measure the accuracy on the test data and, if the data module has `plain_train_dataloader`, on the training data.

    Returns:
        ``test_accuracy`` and ``train_accuracy`` in [0, 1], in the form of the arguments of `Size.report`. An accuracy
        is None if the module logs none.
    """
    with _whole_test_set_on_every_rank(datamodule, trainer):
        test = trainer.test(module, datamodule=datamodule)
    accuracies = {"test_accuracy": _logged_accuracy(test)}
    if hasattr(datamodule, "plain_train_dataloader"):
        train = trainer.test(module, dataloaders=datamodule.plain_train_dataloader())
        accuracies["train_accuracy"] = _logged_accuracy(train)
    return accuracies


def _logged_accuracy(results: list[Mapping[str, float]] | None) -> float | None:
    """Return the accuracy that a module logged in its test under one of the usual names."""
    logged = results[0] if results else {}
    names = ("test_accuracy", "test_acc", "accuracy", "acc")
    return next((float(logged[name]) for name in names if name in logged), None)


@contextmanager
def _whole_test_set_on_every_rank(datamodule: pl.LightningDataModule, trainer: pl.Trainer) -> Iterator[None]:
    """Test on all images in every process, if the data module leaves the distribution of its images to Lightning.

    Lightning repeats images so that all ranks have equally many; the repeated images would count twice. Unequal parts
    are no alternative: Lightning weights its means over ranks by the batch size, and a module that logs without
    `sync_dist` logs the mean of its own part. Data modules that distribute their images themselves, such as ours, do
    not change.
    """
    if trainer.world_size == 1:
        yield
        return
    original = datamodule.test_dataloader

    def test_dataloader() -> object:
        loader = original()
        if not _is_distributed_by_lightning(loader):
            return loader
        # Lightning does not replace a DistributedSampler. This one contains every image, on every rank.
        sampler = UnrepeatedSampler(loader.dataset, num_ranks=1, rank=0)
        return loader_like(loader, batch_size=loader.batch_size, sampler=sampler, drop_last=loader.drop_last)

    datamodule.__dict__["test_dataloader"] = test_dataloader
    try:
        yield
    finally:
        del datamodule.__dict__["test_dataloader"]


def _is_distributed_by_lightning(loader: object) -> bool:
    """Return whether Lightning would add a distributed sampler to a loader."""
    return (
        isinstance(loader, DataLoader)
        and has_length(loader)
        and type(loader.sampler) in (SequentialSampler, RandomSampler)
        and type(loader.batch_sampler) is BatchSampler
    )

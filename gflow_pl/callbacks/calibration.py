"""Batches for scoring, from a loader of our own over the training data; the running train loader is never touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset, Sampler

__all__ = ["calibration_batches", "evaluation_batches", "has_length", "loader_like"]


class _RankShare(Sampler[int]):
    """The positions of one rank, in a private order: every rank draws the same order and takes its share of each batch.

    So the ranks' batches together are the batches that one process would see with that many times the batch size. In a
    shuffled order all ranks have equally many, since they score in step; in the plain order no image is left out.
    """

    def __init__(self, length: int, rank: int, world_size: int, seed: int | None) -> None:
        self._length = length if seed is None else length - length % world_size
        self._rank, self._world_size, self._seed = rank, world_size, seed

    def __len__(self) -> int:
        return len(range(self._rank, self._length, self._world_size))

    def __iter__(self) -> Iterator[int]:
        if self._seed is None:
            return iter(range(self._rank, self._length, self._world_size))
        generator = torch.Generator().manual_seed(self._seed)
        order = torch.randperm(self._length, generator=generator)
        return iter(order.tolist()[self._rank :: self._world_size])


def has_length(loaders: Any) -> bool:
    """Whether the number of batches is known of every loader in a loader or a collection of them."""
    return all(
        not (isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset))
        and isinstance(loader, Sized)
        for loader in CombinedLoader(loaders, "max_size_cycle").flattened
    )


def calibration_batches(trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> Iterable[Any]:
    """Training batches, shuffled by `seed`, augmented and moved as in training.

    Same data set, collate function and batch size as the train loader's; under DDP each rank reads its own share.
    """
    loaders = tree_map_only(DataLoader, lambda dl: _copy_of(dl, trainer, seed), trainer.train_dataloader)
    return _Moved(trainer, module, loaders)


def evaluation_batches(
    trainer: pl.Trainer, module: pl.LightningModule, limit: int | float | None
) -> Iterable[Any] | None:
    """The validation batches of this rank, in order, moved as in training; None if there is no validation loader."""
    loaders = trainer.val_dataloaders
    if isinstance(loaders, list) and len(loaders) == 1:
        loaders = loaders[0]
    if not isinstance(loaders, DataLoader) or not has_length(loaders):
        return None
    copy = _copy_of(loaders, trainer, None)
    number = len(copy) if limit is None else int(limit if isinstance(limit, int) else limit * len(copy))
    return islice(_Moved(trainer, module, copy), min(number, len(copy)))


def _copy_of(loader: DataLoader[Any], trainer: pl.Trainer, seed: int | None) -> DataLoader[Any]:
    """A loader over the same data with an order and random numbers of its own."""
    if isinstance(loader.dataset, IterableDataset):
        return loader_like(loader, seed or 0, batch_size=loader.batch_size, drop_last=loader.drop_last)
    sampler = _RankShare(len(loader.dataset), trainer.global_rank, trainer.world_size, seed)  # type: ignore[arg-type]
    return loader_like(loader, seed or 0, batch_size=_batch_size(loader), sampler=sampler)


def loader_like(loader: DataLoader[Any], seed: int = 0, **options: Any) -> DataLoader[Any]:
    """A loader over the same data, that reads it like another, in batches of its own (`options`)."""
    shared = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": torch.Generator().manual_seed(seed),
    }
    return DataLoader(loader.dataset, **shared, **options)


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """Examples in a batch; of batches that somebody's own sampler makes, on average; None if nothing makes batches."""
    if loader.batch_sampler is None:
        return None
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size or math.ceil(len(loader.dataset) / len(loader))  # type: ignore[arg-type]


class _Moved:
    """Batches of a loader (or a collection of loaders), passed through the module's transfer hooks."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, loaders: Any) -> None:
        self._trainer, self._module = trainer, module
        self._loaders = loaders
        self._mode: Any = getattr(trainer.fit_loop._combined_loader, "_mode", "max_size_cycle")

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._loaders, (dict, list, tuple)):
            batches = (batch for batch, _, _ in CombinedLoader(self._loaders, self._mode))
        else:
            batches = iter(self._loaders)
        for batch in batches:
            converted = self._trainer.precision_plugin.convert_input(batch)
            converted = self._module._on_before_batch_transfer(converted, dataloader_idx=0)
            yield self._trainer.strategy.batch_to_device(converted, dataloader_idx=0)

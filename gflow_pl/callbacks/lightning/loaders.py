"""Batches for scoring, from a loader of our own over the training data; the running train loader is never touched."""

from __future__ import annotations

import math
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from copy import copy, deepcopy
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from gflow_pl.callbacks.lightning.packages import both_packages

_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
"""Torch's own, which ask for positions."""

__all__ = [
    "DatasetKeysError",
    "calibration_batches",
    "custom_sampler_names",
    "has_length",
    "loader_like",
    "validation_batches",
]


class _RankShare(Sampler[Any]):
    """The keys of one rank, in a private order: every rank draws the same order and takes its share of each batch.

    So the ranks' batches together are the batches that one process would see with that many times the batch size. In a
    shuffled order all ranks have equally many, since they score in step; in the plain order no image is left out.
    """

    def __init__(self, keys: Sequence[Any], rank: int, world_size: int, seed: int | None) -> None:
        self._keys, self._length = keys, len(keys) if seed is None else len(keys) - len(keys) % world_size
        self._rank, self._world_size, self._seed = rank, world_size, seed

    def __len__(self) -> int:
        return len(range(self._rank, self._length, self._world_size))

    def __iter__(self) -> Iterator[Any]:
        if self._seed is None:
            order: Sequence[int] = range(self._length)
        else:
            order = torch.randperm(self._length, generator=torch.Generator().manual_seed(self._seed)).tolist()
        return (self._keys[position] for position in order[self._rank : self._length : self._world_size])


class DatasetKeysError(ValueError):
    """A data set knows no positions, and nobody lists its keys."""


class _ByPosition(DataLoader[Any]):
    """Asks for positions where the sampler of training may ask for something else."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except (LookupError, TypeError) as error:
            # A worker's error is its whole traceback.
            reason = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
            raise DatasetKeysError(
                f"PruningCallback: the data set {type(self.dataset).__name__} cannot be read by position ({reason}), so no "
                "batches to score on can be drawn from it: give it a method `keys` that lists what its sampler may ask for."
            ) from error


def has_length(loaders: Any) -> bool:
    """Whether the number of batches is known of every loader in a loader or a collection of them."""
    return all(
        not (isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset))
        and isinstance(loader, Sized)
        for loader in CombinedLoader(loaders, "max_size_cycle").flattened
    )


def custom_sampler_names(loaders: Any) -> list[str]:
    """The samplers of somebody's own in a loader or a collection of them: which examples they draw, nobody else knows."""
    samplers = [
        _sampler_of(loader)
        for loader in CombinedLoader(loaders, "max_size_cycle").flattened
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    ]
    return [type(sampler).__name__ for sampler in samplers if type(sampler) not in _SAMPLERS]


def calibration_batches(trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> Iterable[Any]:
    """Training batches, shuffled by `seed`, augmented and moved as in training.

    Same data set, collate function and batch size as the train loader's, and of a SubsetRandomSampler the same subset; under
    DDP each rank reads its own share. A train loader that is no DataLoader is gone through in the order, and on the share of
    the data, that are its own.

    Raises:
        ValueError: The training data cannot be read a second time.
    """
    loaders = tree_map(lambda loader: _copy_of(loader, trainer, seed), trainer.train_dataloader)
    return _Moved(trainer, module, loaders, training=True)


def validation_batches(
    trainer: pl.Trainer, module: pl.LightningModule, limit: int | float | None
) -> Iterable[Any] | None:
    """The validation batches of this rank, in order, moved as in validation; None if there is no validation loader."""
    loaders = trainer.val_dataloaders
    if isinstance(loaders, list) and len(loaders) == 1:
        loaders = loaders[0]
    if not isinstance(loaders, DataLoader) or not has_length(loaders):
        return None
    try:
        own = _copy_of(loaders, trainer, None)
    except ValueError:  # the training goes on without a number that it does not need
        return None
    number = len(own) if limit is None else int(limit if isinstance(limit, int) else limit * len(own))
    return islice(_Moved(trainer, module, own, training=False), min(number, len(own)))


def _copy_of(loader: Any, trainer: pl.Trainer, seed: int | None) -> Any:
    """A loader over the same data with an order and random numbers of its own."""
    if not isinstance(loader, DataLoader):
        return _copy_of_foreign(loader, trainer, seed)
    if isinstance(loader.dataset, IterableDataset):
        return loader_like(loader, seed or 0, batch_size=loader.batch_size, drop_last=loader.drop_last)
    keys, guessed = _keys_of(loader)
    sampler: Sampler[Any] = _RankShare(keys, trainer.global_rank, trainer.world_size, seed)
    if _asks_for_whole_batches(loader):
        sampler = BatchSampler(sampler, _size_of(loader.sampler, loader), drop_last=False)
    kind = _ByPosition if guessed else DataLoader
    return loader_like(loader, seed or 0, kind, batch_size=_batch_size(loader), sampler=sampler)


def _copy_of_foreign(loader: Any, trainer: pl.Trainer, seed: int | None) -> Any:
    """A copy of a loader of another kind: what going through it writes into its attributes, or their parts, stays in it."""
    if isinstance(loader, Iterator):
        raise ValueError(
            f"PruningCallback: the train loader {type(loader).__name__} keeps its place in itself (it has `__next__`), so batches "
            "to score on would be missing from training: give a DataLoader, or an object whose `__iter__` begins anew."
        )
    own = copy(loader)
    attributes = getattr(own, "__dict__", {})
    attributes.update(tree_map(lambda part: _own_part(part, trainer, seed), dict(attributes)))
    return own


def _own_part(part: Any, trainer: pl.Trainer, seed: int | None) -> Any:
    """What stands for a part of a foreign loader, at any depth of lists, tuples and dicts, in its copy."""
    if isinstance(part, DataLoader):
        return _copy_of(part, trainer, seed)
    if isinstance(part, (list, dict, set, deque, torch.Generator)):
        return copy(part)
    if isinstance(part, (np.random.Generator, np.random.RandomState, Random)):
        return deepcopy(part)
    return part


def _asks_for_whole_batches(loader: DataLoader[Any]) -> bool:
    """Whether the data set is asked for lists of positions, and makes a batch of each by itself."""
    return loader.batch_sampler is None and isinstance(loader.sampler, BatchSampler)


def _keys_of(loader: DataLoader[Any]) -> tuple[Sequence[Any], bool]:
    """What a map-style data set is asked for, and whether that is a guess: positions, or keys that it lists.

    No item is read to find out: data sets may open files, or draw random numbers, where they are first read.
    """
    dataset: Any = loader.dataset
    if isinstance(dataset, dict):
        return list(dataset), False
    sampler = _sampler_of(loader)
    if type(sampler) is SubsetRandomSampler:
        return list(sampler.indices), False
    is_foreign = type(sampler) not in _SAMPLERS
    if is_foreign and hasattr(dataset, "keys"):
        return list(dataset.keys()), False
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"PruningCallback: the data set {type(dataset).__name__} has no length, so no batches to score on can be drawn "
            "from it: give it `__len__`."
        )
    return range(len(dataset)), is_foreign


def _sampler_of(loader: DataLoader[Any]) -> Any:
    """What decides which examples a loader asks for: the sampler below torch's batches and Lightning's shares of ranks."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    is_wrapped = isinstance(sampler, both_packages(DistributedSamplerWrapper))
    return sampler.dataset._sampler if is_wrapped else sampler


def loader_like(
    loader: DataLoader[Any], seed: int = 0, kind: type[DataLoader[Any]] = DataLoader, **options: Any
) -> DataLoader[Any]:
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
    return kind(loader.dataset, **shared, **options)


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """Examples in a batch; None if nothing makes batches."""
    return None if loader.batch_sampler is None else loader.batch_size or _size_of(loader.batch_sampler, loader)


def _size_of(batches: Any, loader: DataLoader[Any]) -> int:
    """Examples in a batch of a sampler of batches; of those that do not tell, on average."""
    return getattr(batches, "batch_size", None) or math.ceil(len(loader.dataset) / len(loader))  # type: ignore[arg-type]


_END = object()


class _Moved:
    """Batches of a loader (or a collection of loaders), passed through the transfer hooks as in training or validation."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, loaders: Any, *, training: bool) -> None:
        self._trainer, self._module, self._training = trainer, module, training
        self._loaders = loaders
        # As it is now, while nothing is scored.
        self._flags = {m: training and m.training for m in module.modules()}
        self._mode: Any = getattr(trainer.fit_loop._combined_loader, "_mode", "max_size_cycle")

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._loaders, (dict, list, tuple)):
            batches = (batch for batch, _, _ in CombinedLoader(self._loaders, self._mode))
        else:
            batches = iter(self._loaders)
        while True:
            with self._in_its_stage():
                batch = next(batches, _END)
                if batch is _END:
                    return
                converted = self._trainer.precision_plugin.convert_input(batch)
                converted = self._module._on_before_batch_transfer(converted, dataloader_idx=0)
                moved = self._trainer.strategy.batch_to_device(converted, dataloader_idx=0)
            yield moved

    @contextmanager
    def _in_its_stage(self) -> Iterator[None]:
        # Data and hooks augment where `trainer.training`, or the flag of a module (which scoring turns off), tells them to.
        stage, flags = self._trainer.state.stage, {m: m.training for m in self._flags}
        setattr(self._trainer, "training" if self._training else "validating", True)
        _set_flags(self._flags)
        try:
            yield
        finally:
            self._trainer.state.stage = stage
            _set_flags(flags)


def _set_flags(flags: dict[nn.Module, bool]) -> None:
    for module, training in flags.items():
        module.training = training

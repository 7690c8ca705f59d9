"""Copies of loaders, so that reading batches to score on does not change the loaders of training."""

from __future__ import annotations

import math
import traceback
from collections import deque
from collections.abc import Hashable, Iterator, Sequence, Sized
from copy import copy, deepcopy
from random import Random
from typing import Any, TypeVar

import numpy as np
import torch
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
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import fabric, pl

__all__ = [
    "DatasetKeysError",
    "custom_sampler_names",
    "has_length",
    "independent_copy",
    "loader_like",
]

_Loader = TypeVar("_Loader")

_TORCH_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
"""Samplers that draw the indices 0, 1, ... of a data set."""


class DatasetKeysError(SettingsError):
    """A data set has no items at the indices 0, 1, ..., and no method `keys` that lists the keys of its items."""


def has_length(loaders: object) -> bool:
    """Return whether every loader in a collection of loaders (or in a single loader) knows its number of batches."""
    return all(
        not (isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset))
        and isinstance(loader, Sized)
        for loader in _flattened(loaders)
    )


def custom_sampler_names(loaders: object) -> list[str]:
    """Return the class names of custom samplers in a collection of loaders, whose indices cannot be reproduced."""
    samplers = [
        _index_sampler(loader)
        for loader in _flattened(loaders)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    ]
    return [type(sampler).__name__ for sampler in samplers if type(sampler) not in _TORCH_SAMPLERS]


def loader_like(
    loader: DataLoader[Any], seed: int = 0, cls: type[DataLoader[Any]] = DataLoader, **options: Any
) -> DataLoader[Any]:
    """Return a new loader that reads the data set of another loader in the same way.

    Args:
        loader: The loader whose data set, workers and collate function are used.
        seed: Seed of the new loader's generator.
        cls: Class of the new loader.
        **options: Further arguments of `DataLoader`: batch size and sampler are not copied.
    """
    shared = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": torch.Generator().manual_seed(seed),
    }
    return cls(loader.dataset, **shared, **options)


def _flattened(loaders: object) -> list[object]:
    """Return the loaders in nested lists, tuples and dicts; a single loader is its own collection."""
    return list(pl.utilities.CombinedLoader(loaders, "max_size_cycle").flattened)


# Copies of loaders


def independent_copy(loader: _Loader, trainer: pl.Trainer, seed: int | None) -> _Loader | DataLoader[Any]:
    """Return a loader over the same data whose iteration does not change the state of the given one.

    Args:
        loader: The loader.
        trainer: The Trainer, for the share of this rank.
        seed: Seed of a shuffled order; None for the order of the data set.
    """
    if not isinstance(loader, DataLoader):
        return _copy_of_custom_loader(loader, trainer, seed)
    if isinstance(loader.dataset, IterableDataset):
        return loader_like(loader, seed or 0, batch_size=loader.batch_size, drop_last=loader.drop_last)
    keys, may_be_wrong = _keys_of_dataset(loader)
    sampler: Sampler[Any] = _RankShareSampler(keys, trainer.global_rank, trainer.world_size, seed)
    if _dataset_makes_batches(loader):
        sampler = BatchSampler(sampler, _size_of_batches(loader.sampler, loader), drop_last=False)
    cls = _IndexingLoader if may_be_wrong else DataLoader
    return loader_like(loader, seed or 0, cls, batch_size=_batch_size(loader), sampler=sampler)


def _copy_of_custom_loader(loader: _Loader, trainer: pl.Trainer, seed: int | None) -> _Loader:
    """Return a shallow copy of a loader that is not a DataLoader, with copies of the state that iterating may change.

    Raises:
        SettingsError: The loader is an iterator, so that every batch taken from it would be missing from training.
    """
    if isinstance(loader, Iterator):
        raise SettingsError(
            f"PruningCallback: the train loader {type(loader).__name__} is an iterator (it has `__next__`), so the "
            "batches to score on would be missing from training: give a DataLoader, or an object whose `__iter__` "
            "begins anew."
        )

    def copy_state(part: object) -> object:
        """Return a copy of an attribute, or of an item of one, if an iteration may change it."""
        if isinstance(part, DataLoader):
            return independent_copy(part, trainer, seed)
        if isinstance(part, (list, dict, set, deque, torch.Generator)):
            return copy(part)
        if isinstance(part, (np.random.Generator, np.random.RandomState, Random)):
            return deepcopy(part)
        return part

    # The new object shares its attributes with the loader, except for those that are copied here.
    own = copy(loader)
    attributes = getattr(own, "__dict__", {})
    attributes.update(tree_map(copy_state, dict(attributes)))
    return own


def _dataset_makes_batches(loader: DataLoader[Any]) -> bool:
    """Return whether the sampler yields lists of indices, and the data set itself makes a batch of each list."""
    return loader.batch_sampler is None and isinstance(loader.sampler, BatchSampler)


def _keys_of_dataset(loader: DataLoader[Any]) -> tuple[Sequence[Any], bool]:
    """Return the keys of the items of a map-style data set, and whether they may be wrong.

    They may be wrong where a custom sampler draws the keys and the data set does not list them: then the indices 0, 1,
    ... are tried. No item is read to find out, since data sets may open files or draw random numbers when they are
    first read.

    Raises:
        SettingsError: The data set has no length.
    """
    dataset: Any = loader.dataset
    if isinstance(dataset, dict):
        return list(dataset), False
    sampler = _index_sampler(loader)
    if type(sampler) is SubsetRandomSampler:
        return list(sampler.indices), False
    is_custom = type(sampler) not in _TORCH_SAMPLERS
    if is_custom and hasattr(dataset, "keys"):
        return list(dataset.keys()), False
    if not hasattr(dataset, "__len__"):
        raise SettingsError(
            f"PruningCallback: the data set {type(dataset).__name__} has no length, so no batches to score on can be "
            "drawn from it: give it `__len__`."
        )
    return range(len(dataset)), is_custom


def _index_sampler(loader: DataLoader[Any]) -> object:
    """Return the sampler that chooses the indices.

    It is the one inside torch's BatchSampler and Lightning's distributed wrapper, where these are in use.
    """
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    is_wrapped = isinstance(sampler, both_packages(fabric.utilities.distributed.DistributedSamplerWrapper))
    # Private; without it, custom samplers could not be recognized under DDP.
    return sampler.dataset._sampler if is_wrapped else sampler


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """Return the number of examples in a batch; None if the loader does not form batches."""
    return None if loader.batch_sampler is None else loader.batch_size or _size_of_batches(loader.batch_sampler, loader)


def _size_of_batches(batch_sampler: object, loader: DataLoader[Any]) -> int:
    """Return the batch size of a batch sampler; on average, if it does not have an attribute for it."""
    return getattr(batch_sampler, "batch_size", None) or math.ceil(len(loader.dataset) / len(loader))  # type: ignore[arg-type]


class _RankShareSampler(Sampler[Any]):
    """A sampler of this rank's share of some keys: all ranks use the same order and take every `world_size`-th key.

    The batches of all ranks together are therefore those of one process with a `world_size` times larger batch size. In
    a shuffled order the shares are equally long, since the ranks score in step; in the plain order no key is left out.

    Args:
        keys: Keys of the data set.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of a shuffled order, which is the same in every iteration; None for the order of `keys`.
    """

    def __init__(self, keys: Sequence[Hashable], rank: int, world_size: int, seed: int | None) -> None:
        self._keys, self._length = keys, len(keys) if seed is None else len(keys) - len(keys) % world_size
        self._rank, self._world_size, self._seed = rank, world_size, seed

    def __len__(self) -> int:
        return len(range(self._rank, self._length, self._world_size))

    def __iter__(self) -> Iterator[Hashable]:
        if self._seed is None:
            order: Sequence[int] = range(self._length)
        else:
            order = torch.randperm(self._length, generator=torch.Generator().manual_seed(self._seed)).tolist()
        return (self._keys[position] for position in order[self._rank : self._length : self._world_size])


class _IndexingLoader(DataLoader[Any]):
    """A DataLoader that reads data by index although training uses a custom sampler, which may draw other keys."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except (LookupError, TypeError) as error:
            # The message of an error in a worker process is its whole traceback, with the reason in the last line.
            reason = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
            raise DatasetKeysError(
                f"PruningCallback: the data set {type(self.dataset).__name__} cannot be read by index ({reason}), so "
                "no batches to score on can be drawn from it: give it a method `keys` that lists the keys of its "
                "items."
            ) from error

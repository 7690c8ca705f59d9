"""Distributing evaluation images over ranks so that every image is used exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, DistributedSampler

__all__ = ["UnrepeatedSampler", "even_batch_size"]


class UnrepeatedSampler(DistributedSampler[Any]):
    """Distributed sampler that returns every image once, in order.

    The sampler that Lightning would add repeats images until all ranks have equally many, and these images count twice
    in an accuracy. Here the numbers differ by up to one.

    Args:
        dataset: Data set with a length.
        num_ranks: Number of ranks.
        rank: Rank of this process.
    """

    def __init__(self, dataset: Dataset[Any], num_ranks: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_ranks, rank=rank, shuffle=False)
        self._length = len(dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, self._length, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self._length, self.num_replicas))


def even_batch_size(batch_size: int, num_images: int, num_ranks: int) -> int:
    """Return the largest batch size up to `batch_size` at which all ranks have equally many batches; 0 if none exists.

    DistributedDataParallel synchronizes buffers in every forward, so a rank with one more batch than the others would
    block.

    Args:
        batch_size: Upper bound.
        num_images: Number of images, distributed by `UnrepeatedSampler`.
        num_ranks: Number of ranks.

    Example:
        >>> even_batch_size(8, 33, 2)  # 17 and 16 images: with 8 a batch, three batches and two
        7
    """
    smallest, surplus = divmod(num_images, num_ranks)
    if surplus == 0:
        return batch_size
    return next((size for size in range(batch_size, 0, -1) if smallest % size != 0), 0)

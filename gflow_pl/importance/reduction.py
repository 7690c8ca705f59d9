"""Reduction of statistics over the ranks of a distributed run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Ranks", "Reduce"]

Reduce = Callable[[Tensor], Tensor]
"""Returns the average of a tensor over all ranks, out of place."""


class Ranks:
    """The ranks that score together. Linear statistics are averaged over them before anything non-linear is applied.

    Args:
        reduce: Returns the average of a tensor over the ranks, out of place; None for a single process. The number of
            ranks and the index of this one are read from ``torch.distributed``.
    """

    def __init__(self, reduce: Reduce | None = None) -> None:
        self.reduce = reduce
        ready = reduce is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.size = torch.distributed.get_world_size() if ready else 1
        self.rank = torch.distributed.get_rank() if ready else 0

    def weighted_mean(self, totals: list[Tensor], count: int) -> list[Tensor]:
        """Return sums over the examples of this rank, divided by the number of examples of all ranks.

        All tensors of one device and dtype are sent as one message, followed by the number of examples.

        Args:
            totals: Sums over the examples of this rank, of any shapes.
            count: Number of these examples.
        """
        if self.reduce is None:
            return [total / count for total in totals]
        means: list[Tensor] = [torch.empty(0)] * len(totals)
        # The order of the tensors is the same on every rank. The order of a set is not, and messages would be mixed up.
        for kind in dict.fromkeys((total.device, total.dtype) for total in totals):
            places = [i for i, total in enumerate(totals) if (total.device, total.dtype) == kind]
            flat = [totals[i].reshape(-1) for i in places]
            message = self.reduce(torch.cat([*flat, torch.full((1,), float(count), device=kind[0], dtype=kind[1])]))
            parts = (message[:-1] / message[-1]).split([part.numel() for part in flat])
            for i, part in zip(places, parts, strict=True):
                means[i] = part.view(totals[i].shape)
        return means

    def counts_before(self, counts: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the sums of whole numbers over the lower ranks, and over all ranks.

        Balanced sampling needs both: the position of an example in its class, and the size of the class.

        Args:
            counts: Whole numbers of this rank, (n,) int64, on the CPU.
            device: Device on which messages are sent.

        Returns:
            Two tensors (n,) int64, on the CPU.
        """
        if self.reduce is None or self.size == 1:
            return torch.zeros_like(counts), counts
        table = torch.zeros(self.size, len(counts), dtype=torch.float64)
        table[self.rank] = counts.double()
        # The average of whole numbers times the number of ranks is whole again, up to rounding.
        summed = (self.reduce(table.to(device, torch.float32)).cpu().double() * self.size).round().long()
        return summed[: self.rank].sum(0), summed.sum(0)

"""Several processes, seen through one function that averages a tensor over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Ranks", "Reduce"]

Reduce = Callable[[Tensor], Tensor]


class Ranks:
    """The processes that score together; linear statistics are averaged over them before anything else is done.

    Args:
        reduce: Returns the average of a tensor over the ranks, out of place; None for a single process. How many ranks
            there are, and which one this is, is asked of ``torch.distributed``.
    """

    def __init__(self, reduce: Reduce | None = None) -> None:
        self.reduce = reduce
        ready = reduce is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.size = torch.distributed.get_world_size() if ready else 1
        self.rank = torch.distributed.get_rank() if ready else 0

    def mean(self, total: Tensor) -> Tensor:
        """The average over the ranks."""
        return total if self.reduce is None else self.reduce(total)

    def weighted_mean(self, totals: list[Tensor], count: int) -> list[Tensor]:
        """Sums over this rank's examples, divided by the examples of all ranks.

        One message for all tensors of a dtype: they travel side by side, the number of examples behind them.
        """
        if self.reduce is None:
            return [total / count for total in totals]
        means: list[Tensor] = [torch.empty(0)] * len(totals)
        # In the order of the tensors: a set's order differs from process to process, and then so would the messages.
        for kind in dict.fromkeys((total.device, total.dtype) for total in totals):
            places = [i for i, total in enumerate(totals) if (total.device, total.dtype) == kind]
            flat = [totals[i].reshape(-1) for i in places]
            message = self.reduce(torch.cat([*flat, torch.full((1,), float(count), device=kind[0], dtype=kind[1])]))
            parts = (message[:-1] / message[-1]).split([part.numel() for part in flat])
            for i, part in zip(places, parts, strict=True):
                means[i] = part.view(totals[i].shape)
        return means

    def counts_before(self, counts: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Whole numbers on the ranks before this one, added up, and on all ranks.

        Args:
            counts: (n,) int64, on the host.
            device: Where messages travel.
        """
        if self.reduce is None or self.size == 1:
            return torch.zeros_like(counts), counts
        table = torch.zeros(self.size, len(counts), dtype=torch.float64)
        table[self.rank] = counts.double()
        # Averages of whole numbers, times the number of ranks, are whole again but for rounding.
        summed = (self.reduce(table.to(device, torch.float32)).cpu().double() * self.size).round().long()
        return summed[: self.rank].sum(0), summed.sum(0)

"""All that knows of several processes; the private names of Lightning's strategies are used here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "all_gather_objects",
    "broadcast",
    "broadcast_buffers",
    "is_first_process",
    "mean_over_ranks",
    "num_ranks",
    "rebuild_ddp",
    "revert_sync_batch_norm",
]


def is_first_process() -> bool:
    """Whether this is the process that writes: of rank 0, or the only one."""
    # Of processes that a user starts by hand, one a node, Lightning knows the rank only later.
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"


def num_ranks(trainer: pl.Trainer) -> int:
    """Processes that train together."""
    return trainer.world_size if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def mean_over_ranks(trainer: pl.Trainer) -> Callable[[Tensor], Tensor] | None:
    """A function that averages a tensor over the ranks, the same to the bit on each; None with one process."""
    if num_ranks(trainer) == 1:
        return None

    def reduce(tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total)
        return total / num_ranks(trainer)

    return reduce


def broadcast(trainer: pl.Trainer, value: Any) -> Any:
    """Rank 0's `value`, on every rank; plain data only."""
    return trainer.strategy.broadcast(value, src=0) if num_ranks(trainer) > 1 else value


def all_gather_objects(trainer: pl.Trainer, value: Any) -> list[Any]:
    """The `value` of every rank, in the order of ranks."""
    if num_ranks(trainer) == 1:
        return [value]
    gathered: list[Any] = [None] * num_ranks(trainer)
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def broadcast_buffers(trainer: pl.Trainer, module: nn.Module) -> None:
    """Give every rank the buffers (running statistics) of rank 0, as DDP itself does before a forward."""
    if num_ranks(trainer) == 1:
        return
    with torch.no_grad():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def rebuild_ddp(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Wrap the rewritten module in a new DistributedDataParallel: the old one's reducer waits for the old gradients.

    Forgetting it is silent with ``find_unused_parameters=True``: the ranks drift apart.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy.model, DistributedDataParallel):
        return
    strategy.model = strategy._setup_model(module)
    strategy._register_ddp_hooks()
    if hasattr(strategy, "_pl_static_graph_delay_done"):
        strategy._pl_static_graph_delay_done = False


def revert_sync_batch_norm(trainer: pl.Trainer, module: nn.Module) -> None:
    """Turn SyncBatchNorm back into ordinary norms now, in place, as Lightning does when its work is over."""
    sync: Any = getattr(trainer.strategy, "_layer_sync", None)
    if sync is not None:
        sync.revert(module)

"""Ranks (processes of a distributed run): what they exchange, and what a cut affects in Lightning's DDP strategy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gflow_pl.callbacks.lightning.packages import both_packages, private_attribute
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import pl

__all__ = [
    "all_gather_objects",
    "broadcast",
    "broadcast_buffers",
    "computed_on_rank_zero",
    "is_first_process",
    "mean_over_ranks",
    "num_ranks",
    "rebuild_ddp",
    "revert_sync_batch_norm",
]

_Value = TypeVar("_Value")


def is_first_process() -> bool:
    """Return whether this process is the one that writes files: the process of rank 0, or the only process.

    Unlike `trainer.is_global_zero`, this works before there is a Trainer.
    """
    # If a user starts one process per node by hand, Lightning learns the rank only when the Trainer is built.
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return getattr(pl.utilities.rank_zero_only, "rank", 0) == 0 and node == "0"


def num_ranks(trainer: pl.Trainer) -> int:
    """Return the number of processes that train together."""
    return trainer.world_size if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def mean_over_ranks(trainer: pl.Trainer) -> Callable[[Tensor], Tensor] | None:
    """Return a function that averages a tensor over the ranks, or None for one process.

    The average is bitwise equal on all ranks.
    """
    if num_ranks(trainer) == 1:
        return None

    def mean(tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total)
        return total / num_ranks(trainer)

    return mean


def broadcast(trainer: pl.Trainer, value: _Value) -> _Value:
    """Return the value of rank 0 on every rank.

    Args:
        trainer: The Trainer.
        value: Plain data that can be pickled; used on rank 0 only.
    """
    return trainer.strategy.broadcast(value, src=0) if num_ranks(trainer) > 1 else value


def computed_on_rank_zero(trainer: pl.Trainer, compute: Callable[[], _Value]) -> _Value:
    """Return, on every rank, what a function returns on rank 0; the other ranks do not call it.

    The function must not communicate: the other ranks wait for its result. Inside of it torch.distributed looks as if
    no process group had been initialized.

    Args:
        trainer: The Trainer.
        compute: A function that returns plain data that can be pickled.

    Raises:
        SettingsError: The function has raised an exception, on the ranks other than 0. Rank 0 raises the exception
            itself.
    """
    if num_ranks(trainer) == 1:
        return compute()
    value: _Value | None = None
    error: Exception | None = None
    if trainer.global_rank == 0:
        try:
            with _without_communication():
                value = compute()
        except Exception as raised:  # the other ranks must not wait forever
            error = raised
    message = None if error is None else f"{type(error).__name__}: {error}"
    value, message = broadcast(trainer, (value, message))
    if error is not None:
        raise error
    if message is not None:
        raise SettingsError(f"Rank 0 has raised {message}")
    return cast(_Value, value)


@contextmanager
def _without_communication() -> Iterator[None]:
    """Let torch.distributed look for the time of the block as if no process group had been initialized."""
    places = (torch.distributed, torch.distributed.distributed_c10d)
    before = [place.is_initialized for place in places]
    for place in places:
        place.is_initialized = lambda: False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place, function in zip(places, before, strict=True):
            place.is_initialized = function  # type: ignore[attr-defined]


def all_gather_objects(trainer: pl.Trainer, value: _Value) -> list[_Value]:
    """Return the values of all ranks, ordered by rank."""
    if num_ranks(trainer) == 1:
        return [value]
    gathered = [value] * num_ranks(trainer)
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def broadcast_buffers(trainer: pl.Trainer, module: nn.Module) -> None:
    """Copy the buffers (running statistics) of rank 0 to every rank, as DDP does before a forward pass."""
    if num_ranks(trainer) == 1:
        return
    with torch.no_grad():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def rebuild_ddp(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Wrap a rewritten module in a new DistributedDataParallel; do nothing under another strategy.

    The reducer of the old wrapper has buckets for gradients of the old shapes. With ``find_unused_parameters=True`` it
    would raise no error, and the ranks would drift apart.
    """
    strategy = cast(pl.strategies.DDPStrategy, trainer.strategy)
    if not isinstance(strategy, both_packages(pl.strategies.DDPStrategy)) or not isinstance(
        strategy.model, DistributedDataParallel
    ):
        return
    # Private: without these two methods the wrapper would lack the settings and communication hooks of the strategy.
    strategy.model = strategy._setup_model(module)
    strategy._register_ddp_hooks()
    # Private: under `static_graph=True` Lightning itself starts the all-reduce of the first step, once per strategy.
    # Unless the flag is reset, the gradients of the first step after a cut are not averaged over the ranks.
    private_attribute(
        strategy, "_pl_static_graph_delay_done", "reduce the first gradients of a static graph after a cut"
    )
    strategy._pl_static_graph_delay_done = False


def revert_sync_batch_norm(trainer: pl.Trainer, module: nn.Module) -> None:
    """Convert SyncBatchNorm layers back to BatchNorm, in place, as Lightning does at the end of training."""
    if not isinstance(trainer.strategy, both_packages(pl.strategies.ParallelStrategy)):
        return
    # Private: None unless the Trainer has `sync_batchnorm=True`. Without it a module that training has left by an
    # exception would keep its SyncBatchNorm layers, which do not run on a CPU.
    layer_sync = private_attribute(trainer.strategy, "_layer_sync", "convert SyncBatchNorm back after an exception")
    if layer_sync is not None:
        layer_sync.revert(module)

"""What has to be the same in a run that is resumed: its schedule, and the random states of its processes."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn

from gflow_pl.callbacks.lightning.ranks import num_ranks
from gflow_pl.callbacks.lightning.rng import restore_rng_state

__all__ = ["check_same_schedule", "restore_rng_of_ranks"]


def check_same_schedule(saved: dict[str, Any], now: dict[str, Any], rounds_done: int) -> None:
    """Say what has changed between two descriptions of a schedule.

    Args:
        saved: Of the checkpoint.
        now: Of the settings; its `kept_after` and `cut_epochs` have an entry a round.
        rounds_done: Rounds that the checkpoint has done.

    Raises:
        ValueError: The rounds done were others.
    """
    if saved == now:
        return
    for name in ("kept_after", "cut_epochs"):
        before, after = saved[name][:rounds_done], now[name][:rounds_done]
        if before != after:
            raise ValueError(
                f"PruningCallback: the checkpoint has done {rounds_done} rounds with {name} {before}, but the settings "
                f"now say {after}: resume with the settings of the run, or start anew from its weights."
            )
    changed = [f"{name} {saved[name]} -> {now[name]}" for name in now if saved[name] != now[name]]
    rank_zero_warn(f"PruningCallback: the schedule has changed since the checkpoint: {'; '.join(changed)}.")


def restore_rng_of_ranks(trainer: pl.Trainer, states: list[dict[str, Any]]) -> None:
    """Put back the random state of this rank, if the checkpoint was written by as many."""
    if len(states) == num_ranks(trainer):
        restore_rng_state(states[trainer.global_rank])
    else:
        rank_zero_warn(
            f"PruningCallback: the checkpoint was written by {len(states)} processes and is resumed by {num_ranks(trainer)}, "
            "so random numbers will differ from an uninterrupted run."
        )

"""The progress of a pruning run: rounds done and rounds to come, saved in checkpoints and restored from them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from gflow_pl.callbacks.lightning.carries_structure import CarriesStructure
from gflow_pl.callbacks.lightning.ranks import all_gather_objects, num_ranks
from gflow_pl.callbacks.lightning.rng import capture_rng_state, restore_rng_state
from gflow_pl.callbacks.pruning_settings import CutTimes, SettingAttributes
from gflow_pl.callbacks.round_row import RowsFile
from gflow_pl.callbacks.tracked_scoring import TrackedScoring
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import pl
from gflow_pl.selection import PruningSchedule
from gflow_pl.values import ChannelGraph
from gflow_pl.values.choices import Target

__all__ = ["PruningState", "pruning_state_in"]

_KEYS = {"rows", "schedule", "graph", "original_costs", "rng"}
"""Keys that every version of the state has, and that no other callback's state has together."""


def pruning_state_in(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the state of a `PruningCallback` (or of a subclass of it) in a training checkpoint; None if there is none.

    It is found by its keys: Lightning stores the states of callbacks under the names of their classes.

    Args:
        checkpoint: Contents of a checkpoint file.
    """
    states = (checkpoint.get("callbacks") or {}).values()
    return next((state for state in states if isinstance(state, dict) and state.keys() >= _KEYS), None)


class PruningState(SettingAttributes, CarriesStructure):
    """Base of `PruningCallback`: the progress of a run, as properties and as plain data in checkpoints.

    Args:
        schedule: Shares to cut in all rounds.
        times: Epochs of all rounds.

    Attributes:
        rows: One row for each round done, by column (see `RoundRow`).
        graph: The traced network; None before training.
    """

    def __init__(self, schedule: PruningSchedule, times: CutTimes) -> None:
        super().__init__()
        self.schedule, self.times = schedule, times
        self.rows: list[dict[str, Any]] = []
        self.graph: ChannelGraph | None = None
        self._original_costs: dict[Target, int] = {}
        self._initial_state: dict[str, Tensor] | None = None
        self._tracked = TrackedScoring()
        self._rows_file = RowsFile()
        self._rng_of_ranks: list[dict[str, Any]] | None = None
        self._rng_to_restore: list[dict[str, Any]] | None = None

    @property
    def cut_epochs(self) -> tuple[int, ...]:
        """Epochs, counted from 0, at whose start the rounds are cut."""
        assert self.times.epochs is not None
        return tuple(self.times.epochs)

    @property
    def rounds_done(self) -> int:
        """Number of rounds that have been cut."""
        return len(self.rows)

    @property
    def finished(self) -> bool:
        """Whether all rounds have been cut."""
        return self.rounds_done >= self.schedule.num_rounds

    @property
    def num_filters(self) -> int | None:
        """Number of filters present now in the layers that can be pruned; None before the network is traced."""
        return None if self.graph is None else self.graph.num_filters

    @property
    def held_lr(self) -> float | None:
        """Learning rate that is held now; None if none is."""
        return None if self.finished else self.prune_lr

    def phase(self, epoch: int) -> str:
        """Return the purpose of an epoch: "warmup", "pruning" (a round is still to come) or "final"."""
        if self.finished:
            return "final"
        return "warmup" if epoch < self.cut_epochs[0] - self.times.every_n_epochs else "pruning"

    # `on_save_checkpoint` in place of `state_dict`: with the latter, Lightning refuses two of these callbacks by a
    # message of its own, before `setup` can say what to do.

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the rounds done, the schedule, the graph, initial weights and random states, as plain data."""
        tracked = self._tracked.state_dict()
        checkpoint.setdefault("callbacks", {})[self.state_key] = {
            "version": 1,
            "rows": [dict(row) for row in self.rows],
            "rows_name": self._rows_file.name,
            "schedule": self._schedule_as_dict(),
            "graph": None if self.graph is None else self.graph.as_dict(),
            "original_costs": dict(self._original_costs),
            "initial": self._initial_state,
            "tracker": tracked["tracker"],
            "tracked_epoch": tracked["epoch"],
            "rng": self._rng_of_ranks if self._rng_of_ranks is not None else [capture_rng_state()],
        }

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue from a checkpoint to train on; raise if the settings contradict the rounds done."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        state = copy.deepcopy(pruning_state_in(checkpoint))
        if state is None or trainer.state.fn != "fit":
            return  # a checkpoint that is only tested must not change the rows of the run
        self.rows, self._rows_file.name = state["rows"], state.get("rows_name") or "pruning.csv"
        self.graph = None if state["graph"] is None else ChannelGraph.from_dict(state["graph"])
        self._original_costs = state["original_costs"]
        self._initial_state = state["initial"] if self.scoring_settings.bias == "distance_from_init" else None
        self._tracked.load_state_dict({"tracker": state["tracker"], "epoch": state.get("tracked_epoch")})
        _check_same_schedule(state["schedule"], self._schedule_as_dict(), self.rounds_done)
        self._rng_to_restore = state["rng"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather all ranks' random states, for checkpoints of the first epoch; write the rows of a resumed run."""
        self._gather_rng(trainer)
        self._rows_file.choose_name(trainer)
        if self.rows:
            self._rows_file.write(trainer, self.rows, self.rows_path)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the random states of all ranks, for a checkpoint."""
        self._gather_rng(trainer)

    def _gather_rng(self, trainer: pl.Trainer) -> None:
        # Not where a checkpoint is saved: if that is on an exception, the other ranks take no part.
        if num_ranks(trainer) > 1:
            self._rng_of_ranks = all_gather_objects(trainer, capture_rng_state())

    def _restore_rng(self, trainer: pl.Trainer) -> None:
        """Restore the random state of this rank from the checkpoint that the run continues from, if any."""
        states, self._rng_to_restore = self._rng_to_restore, None
        if states is not None and len(states) == num_ranks(trainer):
            restore_rng_state(states[trainer.global_rank])
        elif states is not None:
            pl.utilities.rank_zero_warn(
                f"PruningCallback: the checkpoint was written by {len(states)} processes and is resumed by "
                f"{num_ranks(trainer)}, so random numbers will differ from an uninterrupted run."
            )

    def _check_same_network(self, module: pl.LightningModule) -> None:
        """Raise if the module has other shapes than the network that this callback has pruned so far."""
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        if self.graph is not None and any(self.graph.shapes.get(name) != shape for name, shape in shapes.items()):
            raise SettingsError(
                f"PruningCallback: this {type(module).__name__} has other shapes than the network that the callback "
                f"has pruned ({self.rounds_done} of {self.schedule.num_rounds} rounds): make a new PruningCallback for "
                "every network."
            )

    def _schedule_as_dict(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "measure": self.measure.name,
            "kept_after": [schedule.kept_after(k) for k in range(1, schedule.num_rounds + 1)],
            "cut_epochs": list(self.cut_epochs),
            "target": self.target,
        }


def _check_same_schedule(saved: Mapping[str, Any], current: Mapping[str, Any], rounds_done: int) -> None:
    """Raise if the rounds done do not fit the settings of a resumed run; warn if rounds to come have changed.

    Args:
        saved: The schedule in the checkpoint.
        current: The schedule by the settings. The lists `kept_after` and `cut_epochs` have an entry for each round.
        rounds_done: Number of rounds that the checkpoint has done.

    Raises:
        SettingsError: The rounds done were cut at other epochs or to other shares than the settings say.
    """
    if saved == current:
        return
    for name in ("kept_after", "cut_epochs"):
        before, after = saved[name][:rounds_done], current[name][:rounds_done]
        if before != after:
            raise SettingsError(
                f"PruningCallback: the checkpoint has done {rounds_done} rounds with {name} {before}, but the settings "
                f"now say {after}: resume with the settings of the run, or start anew from its weights."
            )
    changed = [f"{name} {saved[name]} -> {current[name]}" for name in current if saved[name] != current[name]]
    pl.utilities.rank_zero_warn(
        f"PruningCallback: the schedule has changed since the checkpoint: {'; '.join(changed)}."
    )

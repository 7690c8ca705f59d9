"""The row that describes a round in pruning.csv, and the file of all rows."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from gflow_pl.callbacks.lightning.packages import callbacks_of
from gflow_pl.callbacks.lightning.ranks import broadcast
from gflow_pl.callbacks.pruning_settings import PathLike
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import pl
from gflow_pl.files import write_rows
from gflow_pl.values import ChannelGroup
from gflow_pl.values.choices import Target

__all__ = ["Removed", "RoundRow", "RowsFile", "count_removed"]


@dataclass(frozen=True)
class RoundRow:
    """Results of one round, in the columns of pruning.csv.

    Attributes:
        round: Number of the round, from 1.
        epoch: Epoch at whose start it was cut, from 0.
        measure: Name of the importance measure.
        fraction_asked: Share of the original target that the schedule wanted to be gone after the round.
        fraction_reached: Share of the original target that is gone.
        filters_asked: Number of filters that the round was to remove; "" if the target is not "filters".
        filters_removed: Number of filters that it removed.
        filters_left: Number of filters that are left.
        share_asked: Share of what was left of the target that the round was to remove.
        share_reached: Share of what was left of the target that it removed.
        parameters: Parameters of the module after the cut.
        macs: Multiply-accumulates of the network after the cut, for one example.
        loss_before: Loss on the first calibration batch before the cut, in evaluation mode; "" if it
            cannot be computed and the measure needs none.
        loss_after: The same after the cut.
        gradient_norm_before: L2 norm of the gradient of that loss before the cut.
        gradient_norm_after: The same after the cut.
        accuracy_after_cut: Validation accuracy right after the cut, in [0, 1]; "" if it was not measured.
        units_removed: Number of units that were removed; a unit that several layers share counts once.
        removed_by_layer: Number of filters that each layer lost, as JSON.
        units_removed_by_layer: Number of units that each layer lost, as JSON.
        seconds: Duration of the round, to the millisecond.
    """

    round: int
    epoch: int
    measure: str
    fraction_asked: float
    fraction_reached: float
    filters_asked: int | str
    filters_removed: int
    filters_left: int
    share_asked: float
    share_reached: float
    parameters: int
    macs: int
    loss_before: float | str
    loss_after: float | str
    gradient_norm_before: float | str
    gradient_norm_after: float | str
    accuracy_after_cut: float | str
    units_removed: int
    removed_by_layer: str
    units_removed_by_layer: str
    seconds: float

    def as_dict(self) -> dict[str, int | float | str]:
        """Return the row by column, as in the file."""
        return dataclasses.asdict(self)

    def numbers(self) -> dict[str, float]:
        """Return the numeric columns for loggers, under names that start with "pruning/"."""
        return {f"pruning/{name}": value for name, value in self.as_dict().items() if isinstance(value, (int, float))}

    def line(self, num_rounds: int, target: Target) -> str:
        """Return the round in one line for the screen."""
        accuracy, before, after = self.accuracy_after_cut, self.loss_before, self.loss_after
        return (
            f"Round {self.round} of {num_rounds} by {self.measure} (epoch {self.epoch}): asked for "
            f"{self.fraction_asked:.1%} of the {target}, reached {self.fraction_reached:.1%}; {self.units_removed} "
            f"units with {self.filters_removed} filters removed, {self.filters_left} filters left, {self.parameters:,} "
            f"parameters, {self.macs:,} multiply-accumulates"
            + ("" if isinstance(before, str) or isinstance(after, str) else f"; loss {before:.4f} -> {after:.4f}")
            + (f", accuracy after the cut {accuracy:.2%}" if not isinstance(accuracy, str) else "")
            + f"; {self.seconds:.1f} s"
        )


class Removed(NamedTuple):
    """Units and filters that a round removed.

    Attributes:
        num_units: Units in all; a unit that several layers share counts once.
        filters_by_layer: Filters of each layer that lost any.
        units_by_layer: Units of each layer that lost any.
    """

    num_units: int
    filters_by_layer: dict[str, int]
    units_by_layer: dict[str, int]


def count_removed(before: Iterable[ChannelGroup], after: Iterable[ChannelGroup]) -> Removed:
    """Count the units and filters that a cut has removed, from the groups of the graph before and after it."""
    num_units, filters, units = 0, Counter[str](), Counter[str]()
    for groups, sign in ((before, 1), (after, -1)):
        for group in groups:
            num_units += sign * group.size
            for part in group.layers:
                filters[part.layer] += sign * part.index.size
                units[part.layer] += sign * group.size
    return Removed(
        num_units,
        {layer: number for layer, number in filters.items() if number},
        {layer: number for layer, number in units.items() if number},
    )


class RowsFile:
    """The CSV file of the rounds' rows, written anew by rank 0 after each round.

    It is the file that the user chose, or else pruning.csv in the run's folder: the folder of a `RunRecorder`, the
    Trainer's log_dir, or its default_root_dir, in this order. In the last two, the file of another run is never
    replaced: the name is then pruning-v1.csv and so on. Nothing is written in a fast_dev_run, nor if the run's folder
    is on another machine.

    All ranks must call every method.

    Attributes:
        name: Name of the file if the user chose none. It is chosen before the first row, and a resumed run keeps it.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._has_warned = False

    def check_path(self, trainer: pl.Trainer, path: PathLike | None) -> None:
        """Raise if the path that the user chose cannot be written to.

        Raises:
            SettingsError: The path is a folder, or its folder cannot be written to.
        """
        if path is None or getattr(trainer, "fast_dev_run", False):
            return
        problem = broadcast(trainer, _problem_with(Path(path)) if trainer.is_global_zero else None)
        if problem is not None:
            raise SettingsError(
                f"PruningCallback: the rounds' rows cannot be written to `rows_path` '{os.fspath(path)}', since "
                f"{problem}."
            )

    def choose_name(self, trainer: pl.Trainer) -> None:
        """Choose the first name that no file in the run's folder has, unless a name was chosen before."""
        folder, is_own = _run_folder(trainer)
        if self.name is not None or folder is None or not trainer.is_global_zero:
            return
        names = (f"pruning-v{k}.csv" if k else "pruning.csv" for k in count())
        self.name = next(name for name in names if is_own or not os.path.lexists(folder / name))

    def write(self, trainer: pl.Trainer, rows: Sequence[Mapping[str, object]], path: PathLike | None) -> None:
        """Replace the file by one with all rows; warn once if that fails."""
        folder, is_own = _run_folder(trainer)
        if path is None and folder is not None:
            path = folder / ("pruning.csv" if is_own else self.name or "pruning.csv")
        if path is None or getattr(trainer, "fast_dev_run", False) or not trainer.is_global_zero:
            return
        try:
            write_rows(path, rows)
        except OSError as error:
            if not self._has_warned:
                pl.utilities.rank_zero_warn(
                    f"PruningCallback: the rounds' rows cannot be written to '{os.fspath(path)}' "
                    f"({error.strerror or error}); training goes on, and the callback's `rows` and the loggers have "
                    "them."
                )
            self._has_warned = True


def _run_folder(trainer: pl.Trainer) -> tuple[Path | None, bool]:
    """Return the folder of a run, and whether it belongs to this run alone.

    The folder is None if it is on another machine, where only loggers can write.
    """
    for callback in callbacks_of(trainer, pl.callbacks.Callback):
        # By this attribute, a callback such as `RunRecorder` declares the folder of the run.
        folder = getattr(callback, "rounds_folder", None)
        if folder is not None:
            return Path(folder), True
    folder = str(trainer.log_dir or trainer.default_root_dir)
    return (None if "://" in folder else Path(folder)), False


def _problem_with(path: Path) -> str | None:
    """Return why a file cannot be written at a path; None if it can."""
    if path.is_dir():
        return "it is a folder"
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        return f"'{above}' is not a folder"
    return None if os.access(above, os.W_OK | os.X_OK) else f"'{above}' cannot be written to"

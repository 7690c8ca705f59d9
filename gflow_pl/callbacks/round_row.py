"""What a round did: one row for pruning.csv and the loggers, one line for the screen."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn

from gflow_pl.callbacks.lightning.packages import callbacks_of
from gflow_pl.callbacks.lightning.ranks import broadcast
from gflow_pl.files import write_rows
from gflow_pl.values import ChannelGroup

__all__ = ["RowsFile", "Stopwatch", "gone", "line_of", "numbers_of"]


def line_of(row: dict[str, Any], num_rounds: int, target: str) -> str:
    """A round in a line."""
    accuracy = row["accuracy_after_cut"]
    return (
        f"Round {row['round']} of {num_rounds} by {row['measure']} (epoch {row['epoch']}): asked for "
        f"{row['fraction_asked']:.1%} of the {target}, reached {row['fraction_reached']:.1%}; "
        f"{row['units_removed']} units with {row['filters_removed']} filters gone, {row['filters_left']} filters left, "
        f"{row['parameters']:,} parameters, "
        f"{row['macs']:,} multiply-accumulates; loss {row['loss_before']:.4f} -> {row['loss_after']:.4f}"
        + (f", accuracy after the cut {accuracy:.2%}" if accuracy != "" else "")
        + f"; {row['seconds']:.1f} s"
    )


def numbers_of(row: dict[str, Any]) -> dict[str, float]:
    """What of a row loggers take, under names of its own."""
    return {f"pruning/{name}": value for name, value in row.items() if isinstance(value, (int, float))}


def gone(before: Iterable[ChannelGroup], after: Iterable[ChannelGroup]) -> dict[str, Any]:
    """The columns that say what a round took: units in all; filters, and units, of each layer as JSON.

    A unit that several layers share counts once in all, and for each of these layers.
    """
    num_units, filters, units = 0, Counter[str](), Counter[str]()
    for groups, sign in ((before, 1), (after, -1)):
        for group in groups:
            num_units += sign * group.size
            for part in group.layers:
                filters[part.layer] += sign * part.index.size
                units[part.layer] += sign * group.size
    return {
        "units_removed": num_units,
        "removed_by_layer": json.dumps({layer: count for layer, count in filters.items() if count}),
        "units_removed_by_layer": json.dumps({layer: count for layer, count in units.items() if count}),
    }


class RowsFile:
    """The file of the rows, written anew by rank 0: the one asked for, else pruning.csv beside what else the run writes.

    A file that another run has left there stays: then it is pruning-v1.csv, and so on. In a RunRecorder's folder, whose other
    files are replaced, it always is pruning.csv. Nothing is written in a fast_dev_run, nor where the run's folder is no local
    one. Every method is to be called on all ranks.

    Attributes:
        name: What the file is called where none was asked for; chosen before the first row, and kept when a run is resumed.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._told = False

    def refuse(self, trainer: pl.Trainer, path: str | os.PathLike[str] | None) -> None:
        """Refuse a path that was asked for and cannot be that of a file.

        Raises:
            ValueError: It is a folder, or lies in none that can be written to.
        """
        if path is None or getattr(trainer, "fast_dev_run", False):
            return
        problem = broadcast(trainer, _problem(Path(path)) if trainer.is_global_zero else None)
        if problem is not None:
            raise ValueError(
                f"PruningCallback: no rows can be written to `rows_path` '{os.fspath(path)}', since {problem}."
            )

    def choose(self, trainer: pl.Trainer) -> None:
        """Take the first name that is free, unless one was taken before."""
        folder, is_own = _folder_of(trainer)
        if self.name is not None or folder is None or not trainer.is_global_zero:
            return
        names = (f"pruning-v{k}.csv" if k else "pruning.csv" for k in count())
        self.name = next(name for name in names if is_own or not os.path.lexists(folder / name))

    def write(self, trainer: pl.Trainer, rows: Sequence[dict[str, Any]], path: str | os.PathLike[str] | None) -> None:
        """Write all rows in place of the file; where that cannot be done, it is said once."""
        folder, is_own = _folder_of(trainer)
        if path is None and folder is not None:
            path = folder / ("pruning.csv" if is_own else self.name or "pruning.csv")
        if path is None or getattr(trainer, "fast_dev_run", False) or not trainer.is_global_zero:
            return
        try:
            write_rows(path, rows)
        except OSError as error:
            if not self._told:
                rank_zero_warn(
                    f"PruningCallback: the rounds' rows cannot be written to '{os.fspath(path)}' ({error.strerror or error}); "
                    "training goes on, and the callback's `rows` and the loggers have them."
                )
            self._told = True


def _folder_of(trainer: pl.Trainer) -> tuple[Path | None, bool]:
    """Where a run writes, None if on another machine, where the loggers have the rows; whether it is a RunRecorder's folder."""
    for callback in callbacks_of(trainer, Callback):
        # By its full name: run_folder.py imports this file.
        if any(
            f"{c.__module__}.{c.__name__}" == "gflow_pl.callbacks.run_folder.RunRecorder"
            for c in type(callback).__mro__
        ):
            return callback.folder, True  # type: ignore[attr-defined]
    folder = str(trainer.log_dir or trainer.default_root_dir)
    return (None if "://" in folder else Path(folder)), False


def _problem(path: Path) -> str | None:
    """Why a path cannot be that of a file, if so."""
    if path.is_dir():
        return "it is a folder"
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        return f"'{above}' is no folder"
    return None if os.access(above, os.W_OK | os.X_OK) else f"'{above}' cannot be written to"


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds, to the millisecond."""
        return round(time.perf_counter() - self._start, 3)

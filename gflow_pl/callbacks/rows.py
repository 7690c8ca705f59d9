"""What a round did: one row for pruning.csv and the loggers, one line for the screen."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from gflow_pl.files import write_rows
from gflow_pl.types import ChannelGroup

__all__ = ["Stopwatch", "gone", "keep_rows", "line_of", "numbers_of"]


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


def keep_rows(trainer: pl.Trainer, rows: Sequence[dict[str, Any]], path: str | os.PathLike[str] | None) -> None:
    """Write all rows in place of the file: `path`, or pruning.csv beside what else the run writes; on rank 0 only.

    To be called on all ranks. Nothing is written in a fast_dev_run, nor where the run's folder is no local one.
    """
    if getattr(trainer, "fast_dev_run", False):
        return
    if path is None:
        folder = str(trainer.log_dir or trainer.default_root_dir)
        if "://" in folder:
            return  # on another machine; the loggers have the rows as well
        path = Path(folder) / "pruning.csv"
    if trainer.is_global_zero:
        write_rows(path, rows)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds, to the millisecond."""
        return round(time.perf_counter() - self._start, 3)

"""What a round did: one row for pruning.csv and the loggers, one line for the screen."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from gflow_pl.types import ChannelGroup

__all__ = ["Stopwatch", "line_of", "numbers_of", "units_gone"]


def line_of(row: dict[str, Any], num_rounds: int, target: str) -> str:
    """A round in a line."""
    accuracy = row["accuracy_after_cut"]
    return (
        f"Round {row['round']} of {num_rounds} by {row['measure']} (epoch {row['epoch']}): asked for "
        f"{row['fraction_asked']:.1%} of the {target}, reached {row['fraction_reached']:.1%}; "
        f"{row['filters_removed']} filters gone, {row['filters_left']} left, {row['parameters']:,} parameters, "
        f"{row['macs']:,} multiply-accumulates; loss {row['loss_before']:.4f} -> {row['loss_after']:.4f}"
        + (f", accuracy after the cut {accuracy:.2%}" if accuracy != "" else "")
        + f"; {row['seconds']:.1f} s"
    )


def numbers_of(row: dict[str, Any]) -> dict[str, float]:
    """What of a row loggers take, under names of its own."""
    return {f"pruning/{name}": value for name, value in row.items() if isinstance(value, (int, float))}


def units_gone(before: Iterable[ChannelGroup], after: Iterable[ChannelGroup]) -> str:
    """JSON: layer name to the filters that a round took from it."""
    left: dict[str, int] = {}
    for groups, sign in ((before, 1), (after, -1)):
        for group in groups:
            for part in group.layers:
                left[part.layer] = left.get(part.layer, 0) + sign * part.index.size
    return json.dumps({layer: count for layer, count in left.items() if count})


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds, to the millisecond."""
        return round(time.perf_counter() - self._start, 3)

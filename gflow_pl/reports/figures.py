"""Figures of a run as PNG files. No display is needed."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from gflow_pl.common.errors import SettingsError
from gflow_pl.files import read_rows, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["layers_figure", "training_figure"]

Row: TypeAlias = Mapping[str, Any]
"""Column to value: a number, a string or None."""

_SHADES = {"warmup": "#f2e8cf", "pruning": "#f6d5d0", "final": "#dde9e0"}
_OTHER_SHADE = "#e8e8e8"
_TRAIN, _TEST, _FILTERS, _CUT = "#7a8ca3", "#1d3f72", "#8f2d1e", "#8f2d1e"


def training_figure(
    rows: str | os.PathLike[str] | Sequence[Row], path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Plot the accuracies and the number of remaining filters over the epochs of a run.

    The phases of the run are shaded. A dotted line marks the start of every epoch with fewer filters than the epoch
    before, which is where filters were cut. Missing values leave a gap.

    Args:
        rows: A metrics.csv file or its rows, with the columns ``epoch`` (from 0), ``phase``, ``train_accuracy`` and
            ``test_accuracy`` (in [0, 1]), and ``filters`` (remaining after the cut).
        path: The PNG file to write.
        title: Title of the figure, such as the name of the run.

    Raises:
        SettingsError: There are no rows, or a row has no epoch.
    """
    # Read the columns.
    rows = read_rows(rows) if isinstance(rows, str | os.PathLike) else list(rows)
    if not rows or any(row.get("epoch") is None for row in rows):
        raise SettingsError("A training figure needs rows with a column 'epoch': train for an epoch first.")
    epochs = [int(row["epoch"]) for row in rows]
    filters = [_number(row, "filters") for row in rows]
    has_filters = any(not math.isnan(value) for value in filters)

    # Draw the accuracies above, and the filters below.
    figure = _new_figure(8, 6 if has_filters else 4)
    axes = figure.subplots(
        2 if has_filters else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + has_filters]
    )
    upper, lower = axes[0, 0], axes[-1, 0]
    for panel in axes[:, 0]:
        _shade_phases(panel, rows, label=panel is upper)
    for column, label, color in (("train_accuracy", "train", _TRAIN), ("test_accuracy", "test", _TEST)):
        values = [100 * _number(row, column) for row in rows]
        upper.plot(epochs, values, color=color, label=label, marker=".", markersize=4, linewidth=1.5)
    upper.set_ylabel("accuracy (%)")
    upper.margins(y=0.1)  # room for the names of the phases above the curves
    if has_filters:
        _draw_filters(lower, epochs, filters)
        cuts = [later for (_, before), (later, after) in pairwise(zip(epochs, filters, strict=True)) if after < before]
        for panel in axes[:, 0]:
            for epoch in cuts:
                panel.axvline(epoch - 0.5, color=_CUT, linewidth=0.8, linestyle=":", zorder=1)
        if cuts:
            upper.plot([], [], color=_CUT, linewidth=0.8, linestyle=":", label="cut")

    # Label the axes.
    lower.set_xlabel("epoch (counted from 0)")
    lower.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    lower.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    upper.set_title(title or "Training", loc="left", fontsize=11)
    upper.legend(loc="lower right", fontsize=8, framealpha=0.9)
    _save(figure, path)


def layers_figure(
    before: Mapping[str, int], after: Mapping[str, int], path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Plot the number of filters of every layer before and after pruning as bars.

    Args:
        before: Name of every layer to its number of filters in the unpruned network, in the order of the network.
        after: Name to number of filters in the pruned network. A missing layer has no filters left.
        path: The PNG file to write.
        title: Title of the figure, such as the name of the run.

    Raises:
        SettingsError: There are no layers.
    """
    if not before:
        raise SettingsError("A figure of layers needs at least one layer.")

    # Draw one pair of bars for every layer.
    names = list(before)
    left = [after.get(name, 0) for name in names]
    figure = _new_figure(max(6.0, 1.5 + 0.18 * len(names)), 4.5)
    axes = figure.subplots()
    places = range(len(names))
    axes.bar(places, list(before.values()), color="#d5dbe3", width=0.85, label="unpruned")
    axes.bar(places, left, color=_TEST, width=0.85, label="left")

    # Label the axes.
    axes.set_xticks(places, names, rotation=90, fontsize=7 if len(names) > 20 else 9)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_xlabel("layer")
    axes.set_ylabel("filters (number)")
    share = sum(left) / max(sum(before.values()), 1)
    summary = f"{sum(left):,} of {sum(before.values()):,} filters left ({share:.1%})"
    axes.set_title(f"{title}: {summary}" if title else summary, loc="left", fontsize=11)
    axes.legend(loc="upper left", fontsize=8)
    _save(figure, path)


def _draw_filters(axes: Axes, epochs: Sequence[int], filters: Sequence[float]) -> None:
    """Draw the number of filters as one horizontal step for every epoch: cuts happen at the start of an epoch."""
    axes.step([epochs[0] - 0.5, *(e + 0.5 for e in epochs)], [filters[0], *filters], where="pre", color=_FILTERS)
    axes.set_ylabel("filters left (number)")
    axes.set_ylim(0, 1.08 * max(value for value in filters if not math.isnan(value)))


def _shade_phases(axes: Axes, rows: Sequence[Row], *, label: bool) -> None:
    """Shade every sequence of epochs of one phase, and write the name of the phase at the top."""
    for phase, stretch in groupby(rows, key=lambda row: row.get("phase")):
        if phase is None:
            continue
        numbers = [int(row["epoch"]) for row in stretch]
        begin, end = min(numbers) - 0.5, max(numbers) + 0.5
        axes.axvspan(begin, end, color=_SHADES.get(str(phase), _OTHER_SHADE), linewidth=0, zorder=0)
        if label:
            axes.annotate(
                str(phase),
                xy=((begin + end) / 2, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, -3),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8,
                color="#555555",
            )


def _number(row: Row, column: str) -> float:
    value = row.get(column)
    return math.nan if value is None else float(value)


def _new_figure(width: float, height: float) -> Figure:
    # Not pyplot, which has global state and may need a display. Imported here because counting does not need it.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    write_bytes(path, data.getvalue())

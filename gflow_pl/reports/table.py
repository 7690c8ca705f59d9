"""Compare the pruned network with the unpruned one, as a table and as plain data."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from gflow_pl.files import write_text

__all__ = ["NetworkReport", "comparison_table", "report_data", "table_text", "write_report"]


@dataclass(frozen=True)
class NetworkReport:
    """Size and accuracies of one network. None means "not measured".

    Attributes:
        name: Name of the network in the table ("unpruned", "pruned").
        macs: Multiply-accumulates of one example, see `Counts`.
        parameters: Number of elements of all parameters.
        state_bytes: Bytes of the saved state dict alone.
        filters: Number of filters of the layers that can be pruned.
        train_accuracy: Accuracy on the training data without augmentation, in [0, 1].
        test_accuracy: Accuracy on the test data, in [0, 1].
    """

    name: str
    macs: int | None = None
    parameters: int | None = None
    state_bytes: int | None = None
    filters: int | None = None
    train_accuracy: float | None = None
    test_accuracy: float | None = None

    @property
    def flops(self) -> int | None:
        """Floating point operations: 2 x `macs`."""
        return None if self.macs is None else 2 * self.macs


def comparison_table(networks: Sequence[NetworkReport], *, title: str | None = None) -> Table:
    """Return a table with one column for every network. A table of two networks fits in 80 columns.

    The compression of a network is the size of the saved state dict of the first network divided by that of this
    network.

    Args:
        networks: The networks, the unpruned one first. With two networks, a last column shows the size of the second
            one as a percentage of the first.
        title: Title of the table.
    """
    # Columns
    table = Table(title=title, title_justify="left", caption=_CAPTION, caption_justify="left")
    table.add_column("")
    for network in networks:
        table.add_column(network.name, justify="right", overflow="fold")
    compares = len(networks) == 2
    if compares:
        table.add_column("left", justify="right")

    # Rows
    for label, name, show in _QUANTITIES:
        values = [_quantity(network, name, networks[0]) for network in networks]
        cells = ["-" if value is None else show(value) for value in values]
        if compares:
            cells.append(_remaining_share(*values) if name in _COSTS else "")
        table.add_row(label, *cells)
    return table


def table_text(table: Table, *, width: int = 80) -> str:
    """Render a table as plain text, the same with and without a terminal."""
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False, no_color=True, highlight=False, legacy_windows=False).print(
        table
    )
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def report_data(networks: Sequence[NetworkReport], facts: Mapping[str, object] | None = None) -> dict[str, object]:
    """Return the content of report.json: ``version``, ``convention``, the `facts`, and the numbers of every network."""
    quantities = [name for _, name, _ in _QUANTITIES]
    return {
        "version": 1,
        "convention": _CAPTION,
        **(facts or {}),
        "networks": {
            network.name: {name: _quantity(network, name, networks[0]) for name in quantities} for network in networks
        },
    }


def write_report(
    path: str | os.PathLike[str], networks: Sequence[NetworkReport], facts: Mapping[str, object] | None = None
) -> None:
    """Write `report_data` to a JSON file, atomically.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot represent.
    """
    write_text(path, json.dumps(report_data(networks, facts), indent=2, allow_nan=False) + "\n")


_CAPTION = (
    "Multiply-accumulates: convolutions and matrix products of one example, a fused multiply-add counts once; "
    "FLOPs = 2 x that; size: the saved state dict alone."
)
_COSTS = ("macs", "flops", "parameters", "state_bytes", "filters")


def _quantity(network: NetworkReport, name: str, first: NetworkReport) -> Any:
    if name != "compression":
        return getattr(network, name)
    return first.state_bytes / network.state_bytes if first.state_bytes and network.state_bytes else None


def _remaining_share(before: int | None, after: int | None) -> str:
    return f"{after / before:.1%}" if before and after is not None else "-"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _count(value: int) -> str:
    return f"{value:,}"


def _ratio(value: float) -> str:
    return f"{value:.2f}x"


def _size(value: int) -> str:
    return f"{value / 1e6:,.2f} MB" if value >= 1e5 else f"{value / 1e3:,.2f} kB"


_QUANTITIES = (
    ("Test accuracy", "test_accuracy", _percent),
    ("Train accuracy", "train_accuracy", _percent),
    ("Multiply-accumulates", "macs", _count),
    ("FLOPs", "flops", _count),
    ("Parameters", "parameters", _count),
    ("Filters", "filters", _count),
    ("Saved size", "state_bytes", _size),
    ("Compression", "compression", _ratio),
)

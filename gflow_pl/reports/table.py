"""A network beside its unpruned self: on screen and as plain data."""

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
    """What is known of one network; None is "not measured" and stays so.

    Attributes:
        name: How the network is called in the table ("unpruned", "pruned").
        macs: Multiply-accumulates of one example, see `Counts`.
        parameters: Elements of all parameters.
        state_bytes: Bytes of the saved state dict alone.
        filters: Filters present in the layers that can be pruned.
        train_accuracy: On the plain, un-augmented training data, in [0, 1].
        test_accuracy: On the test data, in [0, 1].
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
    """Networks side by side, the unpruned one first; two of them fit in 80 columns.

    With two, a last column says what is left of the first one's cost. Compression is the first one's saved bytes
    over those of the network.
    """
    table = Table(title=title, title_justify="left", caption=_CAPTION, caption_justify="left")
    table.add_column("")
    for network in networks:
        table.add_column(network.name, justify="right", overflow="fold")
    compares = len(networks) == 2
    if compares:
        table.add_column("left", justify="right")
    for label, name, show in _QUANTITIES:
        values = [_quantity(network, name, networks[0]) for network in networks]
        cells = ["-" if value is None else show(value) for value in values]
        if compares:
            cells.append(_left(*values) if name in _COSTS else "")
        table.add_row(label, *cells)
    return table


def table_text(table: Table, *, width: int = 80) -> str:
    """The table as plain text, the same with and without a terminal."""
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False, no_color=True, highlight=False, legacy_windows=False).print(
        table
    )
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def report_data(networks: Sequence[NetworkReport], facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Plain data of a comparison: ``version`` and ``convention`` first, then `facts`, then every number by name."""
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
    path: str | os.PathLike[str], networks: Sequence[NetworkReport], facts: Mapping[str, Any] | None = None
) -> None:
    """Write `report_data` as JSON, all or nothing; None is null.

    Raises:
        ValueError: A number is NaN or infinite.
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


def _left(before: int | None, after: int | None) -> str:
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

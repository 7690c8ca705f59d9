"""Rows in a CSV file, one an epoch."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from gflow_pl.reports.files import write_text

__all__ = ["read_rows", "write_rows"]


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write the rows in place of the file, all or nothing.

    Numbers are written so that they read back exactly; None and a missing column are empty fields.

    Args:
        path: The CSV file; its folder is made if it is missing.
        rows: Column to value, one mapping a row.
        columns: The columns that come first, in this order, even if no row has them; others follow as they appear.
    """
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a CSV file: whole numbers as int, other numbers as float, empty fields as None, the rest as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: _value(field) for name, field in row.items()} for row in csv.DictReader(file)]


def _value(field: str | None) -> int | float | str | None:
    if field is None or field == "":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(field)
    return field

"""Rows in a CSV file that is never half written."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["read_rows", "write_rows", "write_text"]


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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old one or the new one and nothing between."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a report is as readable as any other file of the user.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _value(field: str | None) -> int | float | str | None:
    if field is None or field == "":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(field)
    return field

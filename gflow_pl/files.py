"""Files that are never half written: bytes, text, and rows of a table."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["read_rows", "write_bytes", "write_rows", "write_text"]


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing between.

    The folder is made if it is missing.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, for the replacement to be one step; not by `tempfile`, whose files only their owner may read.
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Like `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


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

"""Atomic file writes, and rows of CSV files."""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["atomic_save", "read_rows", "write_bytes", "write_rows", "write_text"]


def atomic_save(obj: Any, path: str | os.PathLike[str]) -> None:
    """Save an object like ``torch.save``, atomically.

    A process killed at any moment leaves the old file or the new one, never a torn one. Several processes may write the
    same target: the file of one of them remains, whole.

    Args:
        obj: The object to save.
        path: The target; its folder is created if it is missing.
    """
    _write_atomically(path, lambda file: torch.save(obj, file))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically; create its folder if it is missing."""
    _write_atomically(path, lambda file: file.write(data))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, text.encode())


def _write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], Any]) -> None:
    """Write a temporary file beside the target, sync it to the disk and rename it over the target."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    # Beside the target: the temporary folder may be on another file system, where a move is a copy. Not by `tempfile`,
    # whose files only their owner may read.
    temporary = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _remove_leftovers(target: Path) -> None:
    """Delete the temporary files of this target whose process, on this host, was killed."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.{glob.escape(socket.gethostname())}.*.part"):
        pid = leftover.name.split(".")[-3]
        if pid.isdigit() and not _is_alive(int(pid)):
            with contextlib.suppress(OSError):  # another process was faster
                leftover.unlink()


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # there, signal 0 ends a process instead of looking for it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process of another user
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where folders can be synced (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows to a CSV file atomically, replacing it.

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
    """Read the rows of a CSV file: whole numbers as int, other numbers as float, empty fields as None, the rest as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: _value(field) for name, field in row.items()} for row in csv.DictReader(file)]


def _value(field: str | None) -> int | float | str | None:
    if field is None or field == "":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(field)
    return field

"""Atomic file writes, and reading and writing of CSV files."""

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


def atomic_save(obj: object, path: str | os.PathLike[str]) -> None:
    """Save an object like ``torch.save``, atomically.

    If the process is killed at any moment, the target is the complete old file or the complete new one. If several
    processes write the same target, it is the complete file of one of them.

    Args:
        obj: The object to save.
        path: The target; its folder is created if it is missing.
    """
    _write_atomically(path, lambda file: torch.save(obj, file))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically. Its folder is created if it is missing.

    Args:
        path: The target.
        data: The contents.
    """
    _write_atomically(path, lambda file: file.write(data))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, in UTF-8. Its folder is created if it is missing.

    Args:
        path: The target.
        text: The contents.
    """
    write_bytes(path, text.encode())


def _write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Write a temporary file in the folder of the target, sync it to the disk and rename it to the target.

    Args:
        path: The target.
        write: Writes the contents to the open file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    # In the folder of the target, because files cannot be renamed across file systems. `tempfile` is not used: only the
    # owner may read its files.
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
    """Delete temporary files of this target that were left by processes on this host that no longer run."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.{glob.escape(socket.gethostname())}.*.part"):
        pid = leftover.name.split(".")[-3]
        if pid.isdigit() and not _is_alive(int(pid)):
            with contextlib.suppress(OSError):  # another process deleted it
                leftover.unlink()


def _is_alive(pid: int) -> bool:
    """Return whether a process on this host runs; True if that cannot be found out."""
    if os.name != "posix":
        return True  # on Windows, os.kill would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so that a rename in it survives a power failure. Windows does not support this."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, object]], columns: Sequence[str] = ()) -> None:
    """Write a CSV file atomically.

    Numbers are written with all digits, so that `read_rows` returns the same values. None and missing columns become
    empty fields.

    Args:
        path: The CSV file. Its folder is created if it is missing.
        rows: Column name to value, for each row.
        columns: Columns that come first, in this order, even if no row has them. Others follow in order of appearance.
    """
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows of a CSV file as dicts from column name to value.

    Whole numbers become int, other numbers float, empty fields None, and all other fields str.

    Args:
        path: The CSV file, with a header.
    """
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: _parsed(field) for name, field in row.items()} for row in csv.DictReader(file)]


def _parsed(field: str | None) -> int | float | str | None:
    """Return the value of a CSV field; see `read_rows`."""
    if field is None or field == "":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(field)
    return field

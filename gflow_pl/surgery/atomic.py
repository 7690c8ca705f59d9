"""Files that are there whole or not at all."""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["atomic_save"]


def atomic_save(obj: Any, path: str | Path) -> None:
    """Like ``torch.save``, but a process killed at any moment leaves the old file or the new one, never a torn one.

    Written beside the target (the temporary folder may be on another file system, where a move is a copy), synced to
    the disk, then renamed over it. Several processes may write the same target: one of their files is there whole in the
    end. What a killed process left beside the target is taken away by the next write of it.

    Args:
        obj: What to save.
        path: The target; its folder is made if it is missing.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _take_leftovers_away(target)
    with _file_beside(target) as (file, beside):
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())
        if os.name != "posix":
            file.close()  # no open file is renamed there; elsewhere it stays locked until it has its name
        os.replace(beside, target)
    _sync_folder(target.parent)


@contextmanager
def _file_beside(target: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file of this process alone, locked while it is written; afterwards it is gone, unless it was renamed."""
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    file = _locked(beside)
    try:
        yield file, beside
    finally:
        file.close()
        beside.unlink(missing_ok=True)


def _locked(path: Path) -> IO[bytes]:
    while True:
        file = open(path, "xb")  # noqa: SIM115 - closed by whoever asked for it
        # Some file systems know no locks; leftovers stay there.
        with suppress(OSError):
            _lock(file)
        if path.exists():
            return file
        file.close()  # another process took it for a leftover before it was locked


def _take_leftovers_away(target: Path) -> None:
    """Delete what killed processes left: the lock on a file ends with its process, whichever way that ends."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        # Being written, already gone, or somebody else's: then it is not ours to delete.
        with suppress(OSError), open(left, "r+b") as file:
            _lock(file, wait=False)
            left.unlink()


def _lock(file: IO[bytes], *, wait: bool = True) -> None:
    if fcntl is None:
        raise OSError("no locks here")
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut, where folders can be synced (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["atomic_save"]


def atomic_save(obj: Any, path: str | Path) -> None:
    """Like ``torch.save``, but a process killed at any moment leaves the old file or the new one, never a torn one.

    Written beside the target (the temporary folder may be on another file system, where a move is a copy), synced to
    the disk, then renamed over it. What a killed process left is overwritten by the next write of the same target.

    Args:
        obj: What to save.
        path: The target; its folder is made if it is missing.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name per target, so that leftovers cannot pile up.
    beside = target.with_name(f".{target.name}.part")
    try:
        with open(beside, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut, where folders can be synced (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

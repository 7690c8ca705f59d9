"""A folder for every run."""

from __future__ import annotations

import os
from pathlib import Path

from gflow_pl.callbacks.lightning.ranks import is_first_process

__all__ = ["claim_folder", "release_if_empty"]

_HANDED_DOWN = "GFLOW_RUN_FOLDER"


def claim_folder(root: str, name: str) -> Path:
    """Make a new folder for a run: `name`, or the first of name-2, name-3, ... that is free.

    Processes that Lightning starts for further ranks use the folder of the first; those that somebody else starts
    (torchrun, SLURM, a command a node) write nothing by themselves, so their answer does not matter.

    Raises:
        ValueError: Nothing can be written there, or the name is more than a name.
    """
    if name in (".", "..") or Path(name).name != name:
        raise ValueError(f"`--name` must be the name of one folder, got '{name}': where it lies is set by --out.")
    if _HANDED_DOWN in os.environ and not is_first_process():
        return Path(os.environ[_HANDED_DOWN])
    if not is_first_process():
        return Path(root) / name
    number = 1
    while True:
        folder = Path(root) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise ValueError(
                    f"The output folder '{folder}' cannot be made: a file is in its place. Choose another --out."
                ) from None
            number += 1
        except OSError as error:
            raise ValueError(
                f"The output folder '{folder}' cannot be written ({error.strerror}): choose another with --out."
            ) from None
        else:
            break
    if not os.access(folder, os.W_OK):
        raise ValueError(f"The output folder '{folder}' cannot be written: choose another with --out.")
    os.environ[_HANDED_DOWN] = str(folder)
    return folder


def release_if_empty(folder: Path | None) -> None:
    """Take the folder of a run that never began away again, if nothing but its settings is in it."""
    os.environ.pop(_HANDED_DOWN, None)
    if folder is None or not is_first_process() or not folder.is_dir():
        return
    files = [path for path in folder.rglob("*") if path.is_file()]
    if all(path.name == "config.yaml" or path.name.startswith(("events.out", "hparams")) for path in files):
        for path in files:
            path.unlink()
        for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
            path.rmdir()
        folder.rmdir()

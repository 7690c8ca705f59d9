"""A new folder for every run."""

from __future__ import annotations

import os
from pathlib import Path

from gflow_pl.callbacks.lightning.ranks import is_first_process
from gflow_pl.common.errors import SettingsError

__all__ = ["ClaimedFolder"]

_FOLDER_OF_FIRST_PROCESS = "GFLOW_RUN_FOLDER"
"""Environment variable by which the first process passes its folder to the processes that Lightning starts."""


class ClaimedFolder:
    """The folder of one run, which no other run writes to.

    Attributes:
        path: The folder; None until `claim` is called.
    """

    def __init__(self) -> None:
        self.path: Path | None = None

    def claim(self, root: str, name: str) -> Path:
        """Create a new folder in `root`: `name`, or the first of name-2, name-3, ... that does not exist.

        Only the first process creates a folder. Processes that Lightning starts use the folder of the first process.
        Processes that torchrun, SLURM or the user start write nothing, so for them the name alone is enough.

        Raises:
            SettingsError: The folder cannot be written, or `name` is not the name of one folder.
        """
        if name in (".", "..") or Path(name).name != name:
            raise SettingsError(
                f"`--name` must be the name of one folder, got '{name}': use --out to set where it lies."
            )
        if is_first_process():
            self.path = _new_folder(Path(root), name)
            os.environ[_FOLDER_OF_FIRST_PROCESS] = str(self.path)
        else:
            self.path = Path(os.environ.get(_FOLDER_OF_FIRST_PROCESS, Path(root) / name))
        return self.path

    def release_if_empty(self) -> None:
        """Delete the folder if the run wrote nothing but its settings, because it failed early or has no results."""
        os.environ.pop(_FOLDER_OF_FIRST_PROCESS, None)
        if self.path is None or not is_first_process() or not self.path.is_dir():
            return
        files = [path for path in self.path.rglob("*") if path.is_file()]
        if not all(path.name == "config.yaml" or path.name.startswith(("events.out", "hparams")) for path in files):
            return
        for path in files:
            path.unlink()
        for path in sorted((path for path in self.path.rglob("*") if path.is_dir()), reverse=True):
            path.rmdir()
        self.path.rmdir()


def _new_folder(root: Path, name: str) -> Path:
    """Create the first folder of name, name-2, name-3, ... that does not exist."""
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)  # fails if another run has created it in the meantime
            break
        except FileExistsError:
            if not folder.is_dir():
                raise SettingsError(
                    f"The output folder '{folder}' cannot be created because a file has that name: choose another "
                    "--out."
                ) from None
            number += 1
        except OSError as error:
            raise SettingsError(
                f"The output folder '{folder}' cannot be written ({error.strerror}): choose another with --out."
            ) from None
    if not os.access(folder, os.W_OK):
        raise SettingsError(f"The output folder '{folder}' cannot be written: choose another with --out.")
    return folder

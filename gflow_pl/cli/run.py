"""Run a command and report its errors."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import gflow_pl
from gflow_pl.callbacks.lightning.packages import both_packages
from gflow_pl.cli.app import GflowCLI
from gflow_pl.cli.claimed_folder import ClaimedFolder
from gflow_pl.cli.configs import with_config_paths
from gflow_pl.common.errors import SettingsError

__all__ = ["run"]

_BUG_REPORT = (
    "gflow: this error is a bug in gflow_pl or in a class that your settings name. If it is in gflow_pl, please "
    "report it in the issue tracker of the project, with the lines above, the command and these versions: gflow_pl "
    f"{gflow_pl.__version__}, torch {torch.__version__}, pytorch-lightning {pl.__version__}."
)


def run(arguments: list[str]) -> int:
    """Run one command.

    Processes of further ranks are started by Lightning with the command line of this process (`sys.argv`). In the
    ``gflow`` command that is the same command again; a script that calls this function is started as a whole.

    Args:
        arguments: The command and its options.

    Returns:
        The exit status: 0 for success, 2 for an error that the user can correct, which is printed in one sentence, and
        130 after Ctrl-C.

    Raises:
        Exception: Every other error is a bug. A note at the end of its traceback explains how to report it.
    """
    _silence_known_messages()
    folder = ClaimedFolder()
    try:
        GflowCLI(with_config_paths(arguments), folder)
    except KeyboardInterrupt:
        return _print_how_to_resume(arguments[0], folder.path)
    except SystemExit as stop:
        # After Ctrl-C, Lightning closes everything and exits with this status.
        if stop.code == 1 and folder.path is not None:
            return _print_how_to_resume(arguments[0], folder.path)
        raise
    except Exception as error:
        settings_error = _settings_error(error)
        if settings_error is None:
            error.add_note(_BUG_REPORT)
            raise
        print(f"gflow {arguments[0]}: {' '.join(str(settings_error).split())}", file=sys.stderr)
        return 2
    finally:
        folder.release_if_empty()
    return 0


def _settings_error(error: BaseException | None) -> BaseException | None:
    """Return the error that the user can correct among an error and its causes, or None.

    jsonargparse raises the errors of a link between settings again, with the original error as the cause.
    """
    while error is not None:
        if isinstance(error, (SettingsError, *both_packages(MisconfigurationException))):
            return error
        error = error.__cause__
    return None


def _print_how_to_resume(command: str, folder: Path | None) -> int:
    """Print the command that resumes a run after Ctrl-C, and return the exit status."""
    checkpoint = folder / "last.ckpt" if folder is not None else None
    hint = ""
    if checkpoint is not None and checkpoint.is_file():
        # The file that the run started from must not be given beside the checkpoint to resume from.
        settings = f"--config {checkpoint.with_name('config.yaml')} --pretrained null"
        resume = "fit" if command == "finetune" else command
        hint = f"; resume it with: gflow {resume} {settings} --ckpt_path {checkpoint}"
    print(f"gflow {command}: stopped{hint}", file=sys.stderr)
    return 130


def _is_informative(record: logging.LogRecord) -> bool:
    """Return whether a log record of Lightning is neither an advertisement nor about a setting that we made."""
    phrases = ("litlogger", "litmodels", "Trainer already configured with model summary", "was configured so")
    return not any(phrase in record.getMessage() for phrase in phrases)


def _silence_known_messages() -> None:
    """Suppress advertisements and warnings that are known to be harmless here."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_informative)
    for message in (
        ".*treespec, LeafSpec.*",
        ".*callbacks used to create the checkpoint.*",
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists.*",
        ".*The dirpath has changed.*",
    ):
        warnings.filterwarnings("ignore", message=message)

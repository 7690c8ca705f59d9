"""What a command writes into the folder of its run: settings, checkpoints, metrics, logs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace
from pytorch_lightning.callbacks import Callback, ProgressBar, RichModelSummary, RichProgressBar
from pytorch_lightning.loggers import Logger

from gflow_pl.callbacks import BestCheckpoint, CarriesStructure, LastCheckpoint, RunRecorder, pruning_state_in
from gflow_pl.cli.trainer import TRAINING_COMMANDS
from gflow_pl.files import write_bytes
from gflow_pl.tasks.pretrained import read_file

__all__ = [
    "copy_unpruned_network",
    "given_callbacks",
    "output_callbacks",
    "run_logger",
    "writes_progress_bar",
]


def given_callbacks(settings: Namespace) -> list[Callback]:
    """Return a new list of the callbacks in the settings of the Trainer, which may be None, one callback or several."""
    callbacks = settings.get("callbacks")
    return [] if callbacks is None else list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]


def output_callbacks(command: str, settings: Namespace, folder: Path) -> list[Callback]:
    """Return the callbacks of the settings, followed by those that every run of the command has.

    Args:
        command: Name of the command.
        settings: Settings of the Trainer.
        folder: Folder of the run.
    """
    callbacks = given_callbacks(settings)
    has_terminal = sys.stdout.isatty()
    if command != "prune" and not any(isinstance(callback, CarriesStructure) for callback in callbacks):
        callbacks.append(CarriesStructure())
    if settings.get("enable_model_summary") is not False:
        callbacks.append(RichModelSummary())
    if settings.get("enable_progress_bar") is not False and has_terminal:
        callbacks.append(RichProgressBar())
    if command in TRAINING_COMMANDS:
        callbacks.append(RunRecorder(folder, prints_epochs=not has_terminal))
        if settings.get("enable_checkpointing") is not False:
            callbacks += [BestCheckpoint(folder), LastCheckpoint(folder)]
    return callbacks


def writes_progress_bar(callbacks: Sequence[Callback]) -> bool:
    """Return whether one of the callbacks is a progress bar.

    Without a terminal, the recorder prints a line per epoch.
    """
    return any(isinstance(callback, ProgressBar) for callback in callbacks)


def run_logger(folder: Path) -> Logger | bool:
    """Return a TensorBoard logger that writes into the folder of the run, or False if TensorBoard is not installed."""
    if not importlib.util.find_spec("tensorboard"):
        return False
    from pytorch_lightning.loggers import TensorBoardLogger

    # Without a version, because a progress bar would show the last four characters of it.
    return TensorBoardLogger(folder, name="tensorboard", version="")


def copy_unpruned_network(ckpt_path: str, folder: Path) -> None:
    """Copy unpruned.ckpt into the folder of a resumed run, if the checkpoint was saved after the first cut.

    The file beside the checkpoint may belong to another run. It belongs to this one if it was saved in the epoch of the
    first cut.

    Args:
        ckpt_path: Checkpoint of the run that is resumed.
        folder: Folder of the new run.
    """
    unpruned = Path(ckpt_path).with_name("unpruned.ckpt")
    state = pruning_state_in(read_file(ckpt_path))
    rounds = [] if state is None else state["rows"]
    if rounds and unpruned.is_file() and read_file(unpruned).get("epoch") == rounds[0]["epoch"]:
        write_bytes(folder / unpruned.name, unpruned.read_bytes())

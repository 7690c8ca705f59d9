"""Run a command; what is the user's mistake ends in one sentence."""

from __future__ import annotations

import logging
import sys
import warnings

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from gflow_pl.cli.app import GflowCLI
from gflow_pl.cli.claimed_folder import release_if_empty
from gflow_pl.cli.configs import with_config_paths
from gflow_pl.cli.parser import one_sentence

__all__ = ["run"]

# Where errors are raised that speak of the user's settings: here, by the settings' parser, and where Lightning reads them.
_ABOUT_SETTINGS = (
    "gflow_pl",
    "jsonargparse",
    "lightning_fabric.utilities.seed",
    "pytorch_lightning.trainer.connectors",
    "pytorch_lightning.trainer.setup",
)


def run(arguments: list[str]) -> int:
    """Run a command; returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    _quieten()
    GflowCLI.folder = None
    try:
        GflowCLI(with_config_paths(arguments))
    except (ValueError, MisconfigurationException, FileNotFoundError, PermissionError) as error:
        origin = _origin(error)
        if not (isinstance(error, MisconfigurationException) or origin.startswith(_ABOUT_SETTINGS)):
            raise
        text = one_sentence(str(error)) if origin.startswith("jsonargparse") else str(error)
        print(f"gflow {arguments[0]}: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _stopped(arguments[0])
    except SystemExit as stop:
        # With this status Lightning leaves a run that Ctrl-C has stopped, after it has closed everything.
        if stop.code == 1 and GflowCLI.folder is not None:
            return _stopped(arguments[0])
        raise
    finally:
        release_if_empty(GflowCLI.folder)
    return 0


def _stopped(command: str) -> int:
    """Say where a run that was stopped can be taken up again."""
    last = GflowCLI.folder / "last.ckpt" if GflowCLI.folder is not None else None
    resume = "fit" if command == "finetune" else command
    rest = ""
    if last is not None and last.is_file():
        # The file that the run started from has done its part, and cannot be given beside the one to resume from.
        settings = f"--config {last.with_name('config.yaml')} --pretrained null"
        rest = f"; take it up again with: gflow {resume} {settings} --ckpt_path {last}"
    print(f"gflow {command}: stopped{rest}", file=sys.stderr)
    return 130


def _origin(error: BaseException) -> str:
    """The module that raised an error: our sentences, and those of the settings' parser, are written for the user."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals.get("__name__", "") if traceback is not None else ""


def _quieten() -> None:
    """Keep advertisements and known harmless warnings off the screen."""
    dull = ("litlogger", "litmodels", "Trainer already configured with model summary", "was configured so")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: not any(word in record.getMessage() for word in dull)
    )
    for message in (
        ".*treespec, LeafSpec.*",
        ".*callbacks used to create the checkpoint.*",
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists.*",
        ".*The dirpath has changed.*",
    ):
        warnings.filterwarnings("ignore", message=message)

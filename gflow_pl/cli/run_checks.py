"""Checks of the settings before anything is trained or written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace

from gflow_pl.callbacks import PruningCallback, pruning_state_in
from gflow_pl.cli.run_output import given_callbacks
from gflow_pl.common.errors import SettingsError
from gflow_pl.models import check_image_size
from gflow_pl.tasks import ImageClassifier
from gflow_pl.tasks.network import check_classifies
from gflow_pl.tasks.pretrained import read_file

__all__ = ["check_before_start", "check_network"]


def check_before_start(command: str, config: Namespace, objects: Namespace) -> None:
    """Raise an error for data, networks, checkpoints and pruning schedules that cannot work.

    Args:
        command: Name of the command.
        config: Settings of the command.
        objects: The same settings with their classes instantiated, apart from the Trainer.

    Raises:
        SettingsError: A setting or a file cannot work; the message says what to change.
    """
    # The data and the network
    module, datamodule = objects["model"], objects["data"]
    check_data = getattr(datamodule, "check_data", None)
    if check_data is not None and not config.get("counts_only"):
        check_data()
    check_network(module, datamodule)

    # The files
    if config.get("base"):
        read_file(config["base"])
    if config.get("ckpt_path"):
        prunes = any(isinstance(callback, PruningCallback) for callback in given_callbacks(objects["trainer"]))
        _check_checkpoint(config["ckpt_path"], module, resumes_without_pruning=command == "fit" and not prunes)

    # The pruning schedule
    pruning = objects.get("pruning")
    if pruning is not None and not objects["trainer"].get("fast_dev_run"):
        pruning.times.check_fits(objects["trainer"].get("max_epochs"))


def check_network(module: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
    """Check that the network of an `ImageClassifier` accepts the data's images and returns a logit for every class."""
    side = getattr(datamodule, "image_size", None)
    if isinstance(module, ImageClassifier) and side is not None:
        check_image_size(module.network, side)
        check_classifies(module.network, module.hparams["num_classes"], side)
        # The model summary needs an example input to count FLOPs.
        module.example_input_array = torch.zeros(1, 3, side, side)


def _check_checkpoint(path: str, module: pl.LightningModule, *, resumes_without_pruning: bool) -> None:
    """Refuse a checkpoint of a network for other classes, and a pruning run that would resume without its callback."""
    contents: Mapping[str, Any] = read_file(path)
    num_classes = (contents.get("hyper_parameters") or {}).get("num_classes")
    if isinstance(module, ImageClassifier) and num_classes not in (None, module.hparams["num_classes"]):
        raise SettingsError(
            f"'{path}' is of a network for {num_classes} classes, but the data has {module.hparams['num_classes']}: "
            "give the data that it was trained on."
        )
    if resumes_without_pruning and pruning_state_in(contents) is not None:
        raise SettingsError(f"'{path}' is of a pruning run: resume it with gflow prune --ckpt_path {path}.")

"""Settings of the module that come from the checkpoint which a command starts from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from pytorch_lightning.utilities import rank_zero_info

from gflow_pl.cli.default_classes import full_class_path
from gflow_pl.common.classes_in_files import check_hyperparameters, network_from_file
from gflow_pl.tasks import ImageClassifier
from gflow_pl.tasks.pretrained import read_file

__all__ = ["network_name", "take_settings_from_checkpoint"]

_CLASSIFIER = f"{ImageClassifier.__module__}.{ImageClassifier.__qualname__}"
_CHOSEN_BY_LIGHTNING = ("best", "last", "hpc", "registry")
_NOT_TAKEN = ("network", "num_classes", "pretrained")


def take_settings_from_checkpoint(config: Namespace) -> None:
    """Replace settings of the module by those stored in the file of `ckpt_path` or `pretrained`, and log each change.

    The network is taken from either file, so that it need not be named again. All other settings are taken from
    `ckpt_path` only: a run that is resumed and a checkpoint that is measured keep the settings of their module.

    Args:
        config: Settings of the command; its ``model.init_args`` are changed in place.

    Raises:
        SettingsError: The file cannot be read, or it names a class that is not built from files.
    """
    init_args = config.model.get("init_args") or Namespace()
    path = config.get("ckpt_path") or config.get("pretrained") or init_args.get("pretrained")
    if path is None or path in _CHOSEN_BY_LIGHTNING:
        return
    saved: dict[str, Any] = read_file(path).get("hyper_parameters") or {}

    # The network. Only the commands store the class of the module, possibly under its shorter, public path.
    network = saved.get("network")
    class_path = config.model.class_path
    is_same_class = saved.get("_class_path", _CLASSIFIER) in (class_path, full_class_path(class_path))
    given = init_args.get("network")
    trusts_file = bool(config.get("trust_file"))
    if is_same_class and network is not None and not trusts_file:
        network = given if _names_same_class(given, network) else network_from_file(network, path)
    if is_same_class and network is not None and network != given:
        rank_zero_info(f"The network is {_as_written(network)}, from '{path}'.")
        config.model.init_args.network = network
    if not config.get("ckpt_path"):
        return

    # All other settings that the module has.
    if not trusts_file:
        unchanged = {name for name, value in saved.items() if name not in init_args or init_args[name] == value}
        check_hyperparameters({"hyper_parameters": saved}, path, {*unchanged, *_NOT_TAKEN})
    for name, value in saved.items():
        if name.startswith("_") or name in _NOT_TAKEN or name not in init_args or init_args[name] == value:
            continue
        rank_zero_info(f"model.{name} is {value} from '{path}', not {init_args[name]}.")
        config.model.init_args[name] = value


def _names_same_class(given: object, network: object) -> bool:
    """Return whether the command names the class of a file's network, which is no network of this package.

    Then the description of the command is used, with its own arguments.
    """
    paths = [value.get("class_path") if isinstance(value, Mapping) else value for value in (given, network)]
    return isinstance(paths[0], str) and "." in paths[0] and paths[0] == paths[1]


def network_name(network: object) -> str:
    """Return a short name of a network for the name of a folder: "resnet56", or the last part of a class path."""
    path = network.get("class_path", "network") if isinstance(network, dict) else str(network)
    return str(path).rpartition(".")[2]


def _as_written(network: object) -> str:
    """Return a network as it is written on the command line."""
    return json.dumps(network) if isinstance(network, dict) else str(network)

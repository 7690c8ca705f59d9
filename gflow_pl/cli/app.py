"""The LightningCLI of the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

from gflow_pl import data  # noqa: F401 - makes the short names of the data modules known
from gflow_pl.callbacks import PruningCallback
from gflow_pl.callbacks.lightning.packages import callbacks_of
from gflow_pl.callbacks.lightning.ranks import is_first_process
from gflow_pl.callbacks.lightning.training_loss import batch_inputs
from gflow_pl.callbacks.lightning.unsupported import check_supported
from gflow_pl.cli.checkpoint_settings import network_name, take_settings_from_checkpoint
from gflow_pl.cli.claimed_folder import ClaimedFolder
from gflow_pl.cli.comparison import UnprunedNetwork, report
from gflow_pl.cli.default_classes import chosen_class_paths
from gflow_pl.cli.parser import OneSentenceParser
from gflow_pl.cli.run_checks import check_before_start, check_network
from gflow_pl.cli.run_output import (
    copy_unpruned_network,
    output_callbacks,
    run_logger,
    writes_progress_bar,
)
from gflow_pl.cli.trainer import TRAINING_COMMANDS, GflowTrainer
from gflow_pl.cli.training_summary import summarize_training
from gflow_pl.common.errors import SettingsError
from gflow_pl.importance import measure_names
from gflow_pl.reports import write_predictions
from gflow_pl.tasks import load_pretrained

__all__ = ["GflowCLI"]

_DEFAULT_CLASSES = {"model": "gflow_pl.ImageClassifier", "data": "gflow_pl.data.Digits"}
_BASE_CLASSES = {"model": pl.LightningModule, "data": pl.LightningDataModule}


class _SaveSettings(SaveConfigCallback):
    """Write the settings of a run, including all defaults, to config.yaml.

    Args:
        args: Arguments of `SaveConfigCallback`.
        folder: Folder of the run.
        kwargs: Keyword arguments of `SaveConfigCallback`.
    """

    def __init__(self, *args: Any, folder: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._folder = folder

    @override
    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.parser.save(self.config, self._folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class GflowCLI(LightningCLI):
    """Parse the command line, create all objects and run one command.

    As in every LightningCLI, creating an object of this class runs the command.

    Args:
        arguments: The command and its options.
        folder: Receives the folder of the run, so that the caller knows it even if the command fails.
    """

    def __init__(self, arguments: Sequence[str], folder: ClaimedFolder | None = None) -> None:
        self._command = arguments[0]
        self._arguments = list(arguments)
        self._claimed = ClaimedFolder() if folder is None else folder
        super().__init__(
            model_class=pl.LightningModule,
            subclass_mode_model=True,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_data=True,
            trainer_class=GflowTrainer,
            trainer_defaults={"max_epochs": 160, "logger": None, "num_sanity_val_steps": 0},
            save_config_callback=_SaveSettings,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            parser_class=OneSentenceParser,
            parser_kwargs={"prog": "gflow"},
            auto_configure_optimizers=False,
            args=self._arguments,
        )

    # Settings

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the given command only: the parsers of all commands would take longer to build than a short run."""
        return {self._command: {"model", "datamodule", "dataloaders"}}

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the Trainer, the model and the data, whose default classes are those that the command line chooses."""
        super().add_core_arguments_to_parser(parser)
        chosen = _DEFAULT_CLASSES | chosen_class_paths(self._arguments[1:], _BASE_CLASSES)
        parser.set_defaults({key: {"class_path": path} for key, path in chosen.items()})

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the folder of the run, the number of classes (from the data to the model) and the pruning settings."""
        parser.add_argument(
            "--out", type=str, default="checkpoints", help="Folder in which the folder of the run is created."
        )
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the folder of the run. By default it names command, network and data.",
        )
        parser.add_argument(
            "--trust_file",
            type=bool,
            default=False,
            help="Build any network class that the file to start from names. By default only networks of this package "
            "and model builders of torchvision and timm are built from a file, because a class path can run any code.",
        )
        parser.link_arguments("data", "model.init_args.num_classes", compute_fn=num_classes, apply_on="instantiate")
        if self._command == "prune":
            parser.add_lightning_class_args(PruningCallback, "pruning")
            _list_measures(parser)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`. LightningCLI's own method warns whenever `sys.argv` has arguments as well."""
        self.config = parser.parse_args(args)

    @override
    def _parse_ckpt_path(self) -> None:
        """Take settings of the module from a checkpoint, by our rules instead of Lightning's.

        Lightning calls this private method between parsing and seeding. If Lightning renamed it, a checkpoint would be
        loaded into the network of the command line, and the weights would not fit.
        """
        take_settings_from_checkpoint(self.config[self._command])

    @override
    def _set_seed(self) -> None:
        """Seed all random number generators. Without this override an invalid seed would end in a traceback."""
        try:
            super()._set_seed()
        except ValueError as error:
            raise SettingsError(f"--seed_everything: {error}") from error

    @override
    def before_instantiate_classes(self) -> None:
        """Store the file to start from, which is loaded later: the network's size is measured at full size first."""
        config = self.config[self._command]
        init_args = config.model.get("init_args") or Namespace()
        given = [path for path in (config.get("pretrained"), init_args.get("pretrained")) if path]
        if len(given) == 2:
            raise SettingsError("`--pretrained` and `--model.pretrained` have the same meaning: give one of them.")
        if given and config.get("ckpt_path"):
            raise SettingsError("`ckpt_path` and `pretrained` both determine the weights: give one of them.")
        if self._command == "finetune" and not given:
            raise SettingsError("finetune needs a file to start from: give --model.pretrained FILE.")
        self._pretrained: str | None = given[0] if given else None
        if init_args.get("pretrained"):
            # config.yaml names the file once, under the key that every command and every module has.
            config.model.init_args.pretrained, config.pretrained = None, given[0]

    # Objects

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Check the settings, claim the folder of the run, and create the Trainer with the callbacks of the run."""
        # Check everything that can be checked, and load the file to start from.
        check_before_start(self._command, self.config[self._command], self.config_init[self._command])
        if self._command == "test":
            self._unpruned = UnprunedNetwork(self.model, self.datamodule)
        if self._pretrained is not None:
            load_pretrained(self.model, self._pretrained)
            check_network(self.model, self.datamodule)  # again, because the file may have another number of classes
        settings = self._get(self.config_init, "trainer")
        if settings.get("fast_dev_run"):
            return self._new_trainer(kwargs)

        # Claim a folder, and create what writes into it.
        name = self._get(self.config, "name") or self._run_name()
        folder = self._claimed.claim(self._get(self.config, "out"), name)
        self.save_config_kwargs["folder"] = folder
        kwargs["callbacks"] = output_callbacks(self._command, settings, folder)
        if settings.get("enable_progress_bar") is None and not writes_progress_bar(kwargs["callbacks"]):
            kwargs["enable_progress_bar"] = False
        if settings.get("logger") is None:
            kwargs["logger"] = run_logger(folder) if self._command in TRAINING_COMMANDS else False
        trainer = self._new_trainer(kwargs)

        # Complete the run folder.
        self._complete_pruning_settings(trainer, folder)
        ckpt_path = self._get(self.config, "ckpt_path")
        if self._command in TRAINING_COMMANDS and ckpt_path is not None and is_first_process():
            copy_unpruned_network(ckpt_path, folder)
        return trainer

    def _new_trainer(self, kwargs: Mapping[str, Any]) -> pl.Trainer:
        """Create the Trainer, and refuse a set-up that pruning does not support before processes are started."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:
            raise SettingsError(str(error)) from error
        for callback in callbacks_of(trainer, PruningCallback):
            check_supported(trainer, callback, PruningCallback)
        return trainer

    def _complete_pruning_settings(self, trainer: pl.Trainer, folder: Path) -> None:
        """Save the unpruned network in the folder, and fill in settings that the measure decides, for config.yaml."""
        for callback in callbacks_of(trainer, PruningCallback):
            if callback.unpruned_path is None:
                callback.unpruned_path = str(folder / "unpruned.ckpt")
        settings = self._get(self.config, "pruning")
        if settings is not None:
            callback = self._get(self.config_init, "pruning")
            for name in list(settings.keys()):
                if settings[name] is None and name != "unpruned_path" and getattr(callback, name, None) is not None:
                    settings[name] = getattr(callback, name)

    def _run_name(self) -> str:
        network = (self._get(self.config, "model").get("init_args") or {}).get("network")
        words = [self._command, type(self.model).__name__ if network is None else network_name(network)]
        words.append(type(self.datamodule).__name__)
        pruning = self._get(self.config_init, "pruning")
        if pruning is not None:
            words.append(pruning.measure.name)
        return "_".join(words).lower()

    @property
    def _folder(self) -> Path:
        """The folder of a command that needs one, which `fast_dev_run` does not create."""
        if self._claimed.path is None:
            raise SettingsError(
                f"{self._command} writes a file, which `fast_dev_run` does not allow: use limits instead."
            )
        return self._claimed.path

    # Commands. LightningCLI calls `self.COMMAND` instead of the Trainer's method, and `self.after_COMMAND` at the end.

    def after_fit(self) -> None:
        """Print and draw the results of a training run."""
        if self._claimed.path is not None and is_first_process():
            summarize_training(self._claimed.path)

    after_prune = after_fit
    after_finetune = after_fit

    def validate(
        self, model: pl.LightningModule, datamodule: pl.LightningDataModule, ckpt_path: str | None = None, **_: object
    ) -> None:
        """Measure a checkpoint on the validation data. Nothing is written."""
        self.trainer.validate(model, datamodule=datamodule, ckpt_path=ckpt_path)

    def test(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        ckpt_path: str | None = None,
        pretrained: str | None = None,
        base: str | None = None,
        counts_only: bool = False,
    ) -> None:
        """Compare a checkpoint with the unpruned network. A file given as `pretrained` is already loaded."""
        report(
            self.trainer,
            model,
            datamodule,
            self._unpruned,
            self._folder,
            source=ckpt_path or self._pretrained,
            ckpt_path=ckpt_path,
            base=base,
            counts_only=counts_only,
        )

    def predict(
        self, model: pl.LightningModule, datamodule: pl.LightningDataModule, ckpt_path: str | None = None, **_: object
    ) -> None:
        """Write predictions.csv."""
        folder = self._folder
        if self.trainer.world_size > 1:
            raise SettingsError("predict runs in one process, so that its rows are in order: set --trainer.devices 1.")
        batches = self.trainer.predict(model, datamodule=datamodule, ckpt_path=ckpt_path) or []
        if is_first_process():
            probabilities = [batch_inputs(batch) for batch in batches if batch is not None]
            image_names = datamodule.predict_names() if hasattr(datamodule, "predict_names") else None
            class_names = getattr(datamodule, "class_names", None)
            write_predictions(folder / "predictions.csv", probabilities, image_names, class_names)
            print(f"  predictions      {folder / 'predictions.csv'}")


def _list_measures(parser: LightningArgumentParser) -> None:
    """Add the names of all measures to the help of the option."""
    for action in parser._actions:
        if action.dest == "pruning.measure":
            action.help = f"{action.help} Names: {', '.join(measure_names(aliases=True))}."


def num_classes(datamodule: pl.LightningDataModule) -> int:
    """Return the number of classes of a data module, or 2 if it has none, in which case the model does not need it."""
    return getattr(datamodule, "num_classes", 2)

"""The LightningCLI behind the commands."""

from __future__ import annotations

import importlib.util
import os
import pydoc
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ProgressBar, RichModelSummary, RichProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from gflow_pl import data  # noqa: F401 - so that the data modules are known by their short names
from gflow_pl.callbacks import BestCheckpoint, CarriesStructure, LastCheckpoint, PruningCallback, RunRecorder
from gflow_pl.callbacks.lightning.packages import callbacks_of
from gflow_pl.callbacks.lightning.ranks import is_first_process
from gflow_pl.callbacks.lightning.unsupported import check_supported
from gflow_pl.cli import outcome
from gflow_pl.cli.claimed_folder import claim_folder
from gflow_pl.cli.parser import OneSentenceParser
from gflow_pl.cli.trainer import GflowTrainer
from gflow_pl.files import write_bytes
from gflow_pl.models import check_image_size
from gflow_pl.tasks import ImageClassifier, load_pretrained
from gflow_pl.tasks.network import check_classifies
from gflow_pl.tasks.pretrained import read_file

__all__ = ["GflowCLI"]

_TRAINING = ("fit", "prune", "finetune")
_CLASSIFIER = f"{ImageClassifier.__module__}.{ImageClassifier.__qualname__}"
_DEFAULT_CLASSES = {"model": "gflow_pl.ImageClassifier", "data": "gflow_pl.data.Digits"}


class _SaveConfig(SaveConfigCallback):
    """Keeps the run's settings in its folder, with what was left open filled in."""

    folder: Path | None = None

    @override
    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.folder is not None:
            self.parser.save(self.config, self.folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class GflowCLI(LightningCLI):
    """Commands to train, prune, fine-tune and measure networks.

    Args:
        arguments: The command and its options.
    """

    folder: Path | None = None

    def __init__(self, arguments: list[str]) -> None:
        self._command = arguments[0]
        # Lightning starts the processes of further ranks with this command line again.
        sys.argv[1:] = arguments
        super().__init__(
            model_class=pl.LightningModule,
            subclass_mode_model=True,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_data=True,
            trainer_class=GflowTrainer,
            trainer_defaults={"max_epochs": 160, "logger": None, "num_sanity_val_steps": 0},
            save_config_callback=_SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            parser_class=OneSentenceParser,
            parser_kwargs={"prog": "gflow"},
            auto_configure_optimizers=False,
        )

    # Settings

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command in hand: building the parsers of the others would take longer than a small run."""
        return {self._command: {"model", "datamodule", "dataloaders"}}

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Model and data may be any class; ours are the defaults."""
        super().add_core_arguments_to_parser(parser)
        parser.set_defaults({name: {"class_path": path} for name, path in _DEFAULT_CLASSES.items()})

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the settings; another class than ours starts from its own defaults, not from ours of the same name."""
        everything = sys.argv
        # Settings are printed, with the right defaults, by the second pass.
        sys.argv = given = [argument for argument in everything if not argument.startswith("--print_config")]
        try:
            super().parse_arguments(parser, args)
        finally:
            sys.argv = everything
        config = self.config[self._command]
        chosen = {name: getattr(config[name], "class_path", path) for name, path in _DEFAULT_CLASSES.items()}
        if chosen != _DEFAULT_CLASSES:
            self._parser(self._command).set_defaults({name: {"class_path": path} for name, path in chosen.items()})
        if chosen != _DEFAULT_CLASSES or len(given) < len(everything):
            super().parse_arguments(parser, args)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run's folder, the link from data to model, and the pruning settings."""
        parser.add_argument(
            "--out", type=str, default="checkpoints", help="Folder in which the run gets a folder of its own."
        )
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run's folder; null makes one.")
        parser.link_arguments(
            "data", "model.init_args.num_classes", compute_fn=outcome.num_classes_of, apply_on="instantiate"
        )
        if self._command == "prune":
            parser.add_lightning_class_args(PruningCallback, "pruning")

    @override
    def _parse_ckpt_path(self) -> None:
        """Takes the network from a checkpoint that is named, and says so."""
        config = self.config[self._command]
        path = config.get("ckpt_path") or config.get("pretrained") or self._model_setting("pretrained")
        if path in (None, "best", "last", "hpc", "registry"):
            return
        saved = read_file(path).get("hyper_parameters") or {}
        network = saved.get("network")
        # A file names its class only if a command wrote it, and then perhaps by its shorter, public path.
        ours = saved.get("_class_path", _CLASSIFIER) in (config.model.class_path, _full_path(config.model.class_path))
        if ours and network is not None and network != config.model.init_args.get("network"):
            rank_zero_info(f"The network is {outcome.spelled(network)}, from '{path}'.")
            config.model.init_args.network = network
        if config.get("ckpt_path"):
            self._take_settings(config, saved, path)

    def _take_settings(self, config: Any, saved: dict[str, Any], path: str) -> None:
        """A run that is resumed, or a checkpoint that is measured, keeps its own module's settings."""
        for name, value in saved.items():
            current = config.model.get("init_args", {}).get(name, None)
            if name.startswith("_") or name in ("network", "num_classes", "pretrained") or current == value:
                continue
            if name in config.model.get("init_args", {}):
                rank_zero_info(f"model.{name} is {value} from '{path}', not {current}.")
                config.model.init_args[name] = value

    def _model_setting(self, name: str) -> Any:
        return (self.config[self._command].model.get("init_args") or {}).get(name)

    # From settings to objects

    @override
    def before_instantiate_classes(self) -> None:
        """Keeps the file to start from for later: the network is counted at full size first."""
        config = self.config[self._command]
        given = [path for path in (config.get("pretrained"), self._model_setting("pretrained")) if path]
        if len(given) == 2:
            raise ValueError("`--pretrained` and `--model.pretrained` say the same: give one of them.")
        if given and config.get("ckpt_path"):
            raise ValueError("`ckpt_path` and `pretrained` both say where the weights come from: give one of them.")
        if self._command == "finetune" and not given:
            raise ValueError("finetune needs a file to start from: give --model.pretrained FILE.")
        self._pretrained: str | None = given[0] if given else None
        if self._model_setting("pretrained"):
            # Said once in config.yaml, in the place that every command and every module has.
            config.model.init_args.pretrained, config.pretrained = None, given[0]

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Checks all that can be checked, makes the run's folder, and only then the Trainer."""
        self._check_before_the_start()
        if self._command == "test":
            self.full_size = outcome.Size.of(self.model, self.datamodule)
            self.base_model = outcome.full_size_copy(self.model)
        if self._pretrained is not None:
            load_pretrained(self.model, self._pretrained)
            self._check_network()  # again: a file may be of as many layers and other classes
        config = self._get(self.config_init, "trainer")
        if config.get("fast_dev_run"):
            return _checked(super().instantiate_trainer(**kwargs))
        # On the class: whoever cleans up after a failed start has no instance.
        GflowCLI.folder = claim_folder(
            self._get(self.config, "out"), self._get(self.config, "name") or self._run_name()
        )
        _SaveConfig.folder = self.folder

        kwargs["callbacks"] = [*_as_list(config.get("callbacks")), *self._callbacks(config)]
        if config.get("enable_progress_bar") is None and not any(
            isinstance(c, ProgressBar) for c in kwargs["callbacks"]
        ):
            kwargs["enable_progress_bar"] = False  # on no terminal; the recorder prints a line an epoch there
        if config.get("logger") is None:
            kwargs["logger"] = self._logger()
        trainer = _checked(super().instantiate_trainer(**kwargs))
        self._fill_in_pruning_settings(trainer)
        self._take_over_the_unpruned_network()
        return trainer

    def _check_before_the_start(self) -> None:
        check_data = getattr(self.datamodule, "check_data", None)
        if check_data is not None and not self._get(self.config, "counts_only"):
            check_data()
        self._check_network()
        if self._get(self.config, "base"):
            read_file(self._get(self.config, "base"))
        ckpt_path = self._get(self.config, "ckpt_path")
        contents = read_file(ckpt_path) if ckpt_path else {}
        num_classes = (contents.get("hyper_parameters") or {}).get("num_classes")
        if isinstance(self.model, ImageClassifier) and num_classes not in (None, self.model.hparams["num_classes"]):
            raise ValueError(
                f"'{ckpt_path}' is of a network for {num_classes} classes, but the data has "
                f"{self.model.hparams['num_classes']}: give the data that it was trained on."
            )
        if self._command == "fit" and "PruningCallback" in contents.get("callbacks", {}):
            callbacks = _as_list(self._get(self.config_init, "trainer").get("callbacks"))
            if not any(isinstance(callback, PruningCallback) for callback in callbacks):
                raise ValueError(
                    f"'{ckpt_path}' is of a pruning run: resume it with gflow prune --ckpt_path {ckpt_path}."
                )
        pruning = self._get(self.config_init, "pruning")
        if pruning is not None and not self._get(self.config_init, "trainer").get("fast_dev_run"):
            pruning.times.check_fits(self._get(self.config_init, "trainer").get("max_epochs"))

    def _check_network(self) -> None:
        side = getattr(self.datamodule, "image_size", None)
        if isinstance(self.model, ImageClassifier) and side is not None:
            check_image_size(self.model.network, side)
            check_classifies(self.model.network, self.model.hparams["num_classes"], side)
            # Without it the model summary says that nothing is computed.
            self.model.example_input_array = torch.zeros(1, 3, side, side)

    def _callbacks(self, config: Any) -> list[Callback]:
        assert self.folder is not None
        given = _as_list(config.get("callbacks"))
        callbacks: list[Callback] = []
        if self._command != "prune" and not any(isinstance(c, CarriesStructure) for c in given):
            callbacks.append(CarriesStructure())
        if config.get("enable_model_summary") is not False:
            callbacks.append(RichModelSummary())
        if config.get("enable_progress_bar") is not False and sys.stdout.isatty():
            callbacks.append(RichProgressBar())
        if self._command in _TRAINING:
            callbacks.append(RunRecorder(self.folder, tells=not sys.stdout.isatty()))
            if config.get("enable_checkpointing") is not False:
                callbacks += [BestCheckpoint(self.folder), LastCheckpoint(self.folder)]
        return callbacks

    def _logger(self) -> Any:
        if self._command not in _TRAINING or not importlib.util.find_spec("tensorboard"):
            return False
        from pytorch_lightning.loggers import TensorBoardLogger

        assert self.folder is not None
        # Without a version: a progress bar would show its last four letters.
        return TensorBoardLogger(self.folder, name="tensorboard", version="")

    def _fill_in_pruning_settings(self, trainer: pl.Trainer) -> None:
        """Settings that the measure decided become visible in config.yaml; the unpruned network is kept in the folder."""
        for callback in callbacks_of(trainer, PruningCallback):
            if callback.unpruned_path is None and self.folder is not None:
                callback.unpruned_path = os.fspath(self.folder / "unpruned.ckpt")
        settings = self.config[self._command].get("pruning")
        if settings is not None:
            callback = self._get(self.config_init, "pruning")
            for name in list(settings.keys()):
                if settings[name] is None and name != "unpruned_path" and getattr(callback, name, None) is not None:
                    settings[name] = getattr(callback, name)

    def _take_over_the_unpruned_network(self) -> None:
        """The folder of a run that is resumed after its first cut holds the network before it, too."""
        ckpt_path = self._get(self.config, "ckpt_path")
        if self._command not in _TRAINING or ckpt_path is None or self.folder is None or not is_first_process():
            return
        unpruned = Path(ckpt_path).with_name("unpruned.ckpt")
        rounds = read_file(ckpt_path).get("callbacks", {}).get("PruningCallback", {}).get("rows", [])
        # Of this very run, not only beside its checkpoint: it was saved in the epoch of the first cut.
        if rounds and unpruned.is_file() and read_file(unpruned).get("epoch") == rounds[0]["epoch"]:
            write_bytes(self.folder / unpruned.name, unpruned.read_bytes())

    def _run_name(self) -> str:
        network = self._model_setting("network")
        words = [self._command, outcome.short_name(network) if network is not None else type(self.model).__name__]
        words.append(type(self.datamodule).__name__)
        pruning = self._get(self.config_init, "pruning")
        if pruning is not None:
            words.append(pruning.measure.name)
        return "_".join(words).lower()

    # After the work

    def after_fit(self) -> None:
        """Says what came of it, and draws it."""
        if self.folder is not None and is_first_process():
            outcome.conclude(self.trainer, self.folder)

    after_prune = after_fit
    after_finetune = after_fit

    def validate(
        self, model: pl.LightningModule, datamodule: Any = None, ckpt_path: str | None = None, **_: Any
    ) -> None:
        """Measure on the validation data; nothing is written, so the run's folder goes again."""
        self.trainer.validate(model, datamodule=datamodule, ckpt_path=ckpt_path)

    def test(
        self,
        model: pl.LightningModule,
        datamodule: Any = None,
        ckpt_path: str | None = None,
        pretrained: str | None = None,
        base: str | None = None,
        counts_only: bool = False,
    ) -> None:
        """Report on a checkpoint, beside its unpruned self."""
        assert self.folder is not None
        outcome.report(self, ckpt_path or self._pretrained, ckpt_path, base, counts_only)

    def predict(
        self, model: pl.LightningModule, datamodule: Any = None, ckpt_path: str | None = None, **_: Any
    ) -> None:
        """Write predictions.csv."""
        assert self.folder is not None
        if self.trainer.world_size > 1:
            raise ValueError("predict runs in one process, so that its rows are in order: set --trainer.devices 1.")
        predictions = self.trainer.predict(model, datamodule=datamodule, ckpt_path=ckpt_path)
        if is_first_process():
            outcome.write_predictions(self.folder / "predictions.csv", predictions, datamodule)


def _checked(trainer: pl.Trainer) -> pl.Trainer:
    """The Trainer, unless its set-up cannot work: processes that are spawned would bury the sentence."""
    for callback in callbacks_of(trainer, PruningCallback):
        check_supported(trainer, callback, PruningCallback)
    return trainer


def _full_path(class_path: str) -> str:
    """The path of a class in the module that defines it."""
    found = pydoc.locate(class_path)
    return f"{found.__module__}.{found.__qualname__}" if isinstance(found, type) else class_path


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]

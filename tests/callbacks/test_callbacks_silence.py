"""Nothing is logged while filters are scored, and a training step can still use its logger."""

import copy
import logging
import os
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger, Logger
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

sys.path.insert(0, str(Path(__file__).parent))
from pruning_runs import prune
from small_nets import SmallModule, images, trainer

from gflow_pl import PruningCallback
from gflow_pl.callbacks.lightning.silence import without_side_effects


class Run:
    """An experiment like those of hosted loggers."""

    dir, path, number = "/somewhere", Path("/somewhere"), 3

    def __init__(self) -> None:
        self.summary, self.config, self.calls = {}, {"lr": 0.5}, []

    def get_logdir(self):
        return self.dir

    def log(self, *values):
        self.calls.append(values)
        return self


class HostedLogger(CSVLogger):
    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.run = Run()

    @property
    def experiment(self):
        return self.run

    def _ignore(self, *_, **__):
        pass

    log_hyperparams = log_metrics = save = finalize = _ignore


def test_a_training_step_can_use_its_logger_while_filters_are_scored(tmp_path) -> None:
    """The logger keeps its class, folders and readable values; everything that writes is ignored."""
    written = []

    class Writes(SmallModule):
        def training_step(self, batch, batch_idx):
            logger, before = self.logger, [len(run_of_logger.calls), dict(run_of_logger.summary)]
            assert isinstance(logger, HostedLogger)
            assert isinstance(logger, Logger)
            assert logger.save_dir == str(tmp_path)
            assert self.trainer.log_dir == logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
            run = logger.experiment
            assert os.path.join(run.dir, run.get_logdir(), run.path, "x")
            assert run.number * run.config["lr"] == 1.5
            run.summary["best"] = batch_idx
            run.config["more"] = 1
            run.log({"a": 1}).log("b")
            if not self.training:
                assert not hasattr(run, "no_such_thing")
                with run.log("c").section("d") as section:
                    section["e"].f(1)
                copy.deepcopy(logger)
                assert before == [len(run_of_logger.calls), run_of_logger.summary]
                written.append(batch_idx)
            return super().training_step(batch, batch_idx)

    pruning = PruningCallback("loss", fraction=0.5, rounds=1, num_samples=32)
    logger = HostedLogger(tmp_path)
    run_of_logger = logger.run
    trainer(tmp_path, callbacks=[pruning], logger=logger, max_epochs=2).fit(Writes(), DataLoader(images(64), 16))
    assert written
    assert len(run_of_logger.calls) == 16


def test_scoring_logs_nothing(tmp_path) -> None:
    written, folders = [], set()

    class Spy(CSVLogger):
        def log_image(self, key, images):
            written.append(key)

    class Writes(SmallModule):
        def training_step(self, batch, batch_idx):
            if not self.training:
                written.clear()
            self.logger.log_image("a", [])
            self.logger.experiment.log_metrics({"raw": float(len(written))})
            for logger in self.loggers:
                logger.log_metrics({"also": 1.0})
            folders.add((self.trainer.log_dir, self.logger.log_dir, self.logger.name, self.logger.version))
            if not self.training:
                assert not written
            return super().training_step(batch, batch_idx)

    pl.seed_everything(0)
    logger = Spy(tmp_path, name="mine")
    pruning = PruningCallback("loss", fraction=0.5, rounds=1, num_samples=32)
    run = trainer(tmp_path, callbacks=[pruning], logger=logger, max_epochs=2)
    module = Writes()
    run.fit(module, DataLoader(images(64), batch_size=16))
    assert run.loggers == [logger]
    assert written == ["a"] * 4, "the steps after the cut"
    assert folders == {(logger.log_dir, logger.log_dir, "mine", 0)}


def test_unbalanced_samples_are_reported_once_per_fit(tmp_path, caplog) -> None:
    def loss(module, batch):
        return F.mse_loss(module(batch[0]).mean(1), batch[1])

    data = images(64)
    data = DataLoader(TensorDataset(data.tensors[0], data.tensors[1].float()), batch_size=16)

    class Regresses(SmallModule):
        def training_step(self, batch, batch_idx):
            return loss(self, batch)

    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO"):
            prune(tmp_path, data, Regresses(), measure="grasp", loss_fn=loss, rounds=3)
        assert caplog.text.count("Samples are not balanced over classes") == 1
        assert not logging.getLogger("gflow_pl.importance.score").filters


def test_weights_that_a_training_step_changes_by_hand_are_restored() -> None:
    """A teacher that the step moves, a gradient that it accumulates, and a parameter that it replaces."""

    class Teaching(SmallModule):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                for theirs, ours in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    theirs.mul_(0.9).add_(ours + 1, alpha=0.1)
                self.hidden[0].weight.data += 1
            loss = super().training_step(batch, batch_idx)
            loss.backward(retain_graph=True)
            self.scale = torch.nn.Parameter(self.scale + 1)
            return loss

    module = Teaching()
    module.net = next(iter(module.children()))
    module.teacher, module.hidden = copy.deepcopy(module.net), [torch.nn.Linear(2, 2)]
    module.scale = torch.nn.Parameter(torch.zeros(1))
    values = {name: value.clone() for name, value in module.state_dict().items()}
    hidden, scale = module.hidden[0].weight.clone(), module.scale
    module.log = module.log_dict = lambda *args, **kwargs: None
    batch = next(iter(DataLoader(images(), 8)))
    with without_side_effects(module) as effects:
        for _ in range(2):
            module.training_step(batch, 0)
            effects.undo()
            assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
            assert torch.equal(module.hidden[0].weight, hidden)
            assert module.scale is scale
            assert all(parameter.grad is None for parameter in module.parameters())

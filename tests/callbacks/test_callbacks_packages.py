"""Classes of Lightning's two packages are recognized, and classes that only have the same names are not."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule, images, trainer

from gflow_pl import PruningCallback
from gflow_pl.callbacks.lightning.best_checkpoints import BestAfterCuts
from gflow_pl.callbacks.lightning.carries_structure import AtomicCheckpointIO
from gflow_pl.callbacks.lightning.packages import both_packages, callbacks_of
from gflow_pl.callbacks.lightning.unsupported import check_supported


@pytest.mark.parametrize(
    "name", ["EarlyStopping", "ModelCheckpoint", "RunRecorder", "StochasticWeightAveraging", "WeightAveraging"]
)
def test_a_callback_with_the_name_of_a_known_class_does_not_disturb_a_pruning_run(name, tmp_path) -> None:
    pruning = PruningCallback("magnitude", fraction=0.5, rounds=2)
    run = trainer(tmp_path, callbacks=[type(name, (Callback,), {})(), pruning])
    run.fit(SmallModule(), DataLoader(images(32), batch_size=16))
    assert pruning.finished


def test_a_strategy_with_the_name_of_an_unsupported_one_is_supported(tmp_path) -> None:
    strategy = type("FSDPStrategy", (pl.strategies.SingleDeviceStrategy,), {})("cpu")
    pruning = PruningCallback("magnitude", fraction=0.5)
    check_supported(trainer(tmp_path, strategy=strategy, callbacks=[pruning]), pruning, PruningCallback)


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_subclasses_of_either_package_are_recognized(package, tmp_path, caplog) -> None:
    package = pytest.importorskip(package)
    stopping = type("Mine", (package.callbacks.EarlyStopping,), {})("val_loss", mode="max")
    checkpoint = type("Saves", (package.callbacks.ModelCheckpoint,), {})(tmp_path, monitor="val_loss")
    stopping.wait_count, stopping.best_score = 3, torch.tensor(0.5)
    checkpoint.best_model_path, checkpoint.best_model_score = "best.ckpt", torch.tensor(0.5)
    run = package.Trainer(callbacks=[stopping, checkpoint], logger=False, accelerator="cpu", enable_progress_bar=False)
    with caplog.at_level("INFO"):
        BestAfterCuts().reset(run)
    assert "'best.ckpt' is of the network before the last cut" in caplog.text
    assert (stopping.wait_count, float(stopping.best_score)) == (0, -torch.inf)
    assert (checkpoint.best_model_path, checkpoint.best_model_score) == ("", None)
    assert callbacks_of(run, pl.callbacks.EarlyStopping) == [stopping]


def test_a_package_that_is_not_imported_has_no_counterparts(monkeypatch) -> None:
    pytest.importorskip("lightning.pytorch")
    assert len(both_packages(pl.callbacks.EarlyStopping, pl.Trainer)) == 4
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    assert both_packages(pl.callbacks.EarlyStopping, PruningCallback) == (pl.callbacks.EarlyStopping, PruningCallback)


def module_of(package):
    """Return a module of the package `lightning`."""

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = SmallModule().net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Module()


def test_a_trainer_and_a_module_of_the_package_lightning(tmp_path) -> None:
    package = pytest.importorskip("lightning.pytorch")

    module = module_of(package)
    before = sum(p.numel() for p in module.parameters())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = PruningCallback("loss", fraction=0.5, rounds=1, num_samples=16)
    run = package.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback], **quiet)
    run.fit(module, DataLoader(images(32), batch_size=16))
    assert sum(p.numel() for p in module.parameters()) < before
    assert isinstance(run.strategy.checkpoint_io, AtomicCheckpointIO), "checkpoints are written atomically"
    run.save_checkpoint(tmp_path / "file.ckpt")
    saved = torch.load(tmp_path / "file.ckpt", weights_only=True)
    assert saved["gflow_pl"]["structure"]["shapes"]["net.4.weight"] == list(module.net[4].weight.shape)
    assert saved["callbacks"]["PruningCallback"]["rows"] == callback.rows

    # Resuming and refusals are the same as with pytorch_lightning.
    callback = PruningCallback("loss", fraction=0.5, rounds=1, num_samples=16)
    run = package.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback], **quiet)
    run.fit(again := module_of(package), DataLoader(images(32), batch_size=16), ckpt_path=tmp_path / "file.ckpt")
    assert callback.rounds_done == 1
    assert again.net[4].weight.shape == module.net[4].weight.shape
    averaging = package.callbacks.StochasticWeightAveraging(0.1)
    callbacks = [PruningCallback("loss", fraction=0.5, rounds=1), averaging]
    run = package.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **quiet)
    with pytest.raises(MisconfigurationException, match="use WeightAveraging"):
        run.fit(module_of(package), DataLoader(images(32), batch_size=16))


@pytest.mark.parametrize("first", ["pruning", "average"])
def test_averaged_models_of_the_package_lightning_are_pruned(first, tmp_path) -> None:
    package = pytest.importorskip("lightning.pytorch")
    average, callback = package.callbacks.EMAWeightAveraging(decay=0.5), PruningCallback("magnitude", fraction=0.5)

    run = package.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[callback, average] if first == "pruning" else [average, callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module := module_of(package), DataLoader(images(32), batch_size=16))
    assert sum(p.numel() for p in module.parameters()) == callback.rows[-1]["parameters"]


ALONE = """
import sys, tempfile
for name in {blocked!r}:
    sys.modules[name] = None
import {package} as pl
import torch
from gflow_pl import GradientFlowMonitor, ImageClassifier, PruningCallback, data
from gflow_pl.callbacks import RunRecorder

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

module = Module()
trainer = pl.Trainer(
    max_epochs=2, accelerator="cpu", callbacks=[PruningCallback("magnitude", fraction=0.5)], logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=tempfile.mkdtemp(),
)
trainer.fit(module, torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=8))
assert module.net[0].out_features == 8
assert all(sys.modules[name] is None for name in {blocked!r})
assert isinstance(trainer.callbacks[0], pl.Callback)
"""


@pytest.mark.parametrize(
    ("package", "blocked"),
    [("pytorch_lightning", ["lightning"]), ("lightning.pytorch", ["pytorch_lightning", "lightning_fabric"])],
)
def test_the_callback_prunes_with_one_package_alone(package, blocked) -> None:
    pytest.importorskip(package)
    code = ALONE.format(package=package, blocked=blocked)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("class_path", ["gflow_pl.PruningCallback", "gflow_pl.callbacks.pruning.PruningCallback"])
def test_the_command_line_of_either_package_takes_the_callback_in_yaml(package, class_path, tmp_path) -> None:
    cli = pytest.importorskip(f"{package}.cli")
    demos = pytest.importorskip(f"{package}.demos.boring_classes")
    config = {
        "trainer": {
            **{"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)},
            "callbacks": [{"class_path": class_path, "init_args": {"measure": "magnitude", "rounds": 2}}],
        }
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    made = cli.LightningCLI(
        demos.BoringModel,
        demos.BoringDataModule,
        run=False,
        args=["--config", str(tmp_path / "run.yaml")],
        save_config_callback=None,
        seed_everything_default=0,
    )
    found = callbacks_of(made.trainer, PruningCallback)
    assert [callback.schedule.num_rounds for callback in found] == [2]


def test_a_callback_is_pickled_under_its_one_class_path() -> None:
    pruning = PruningCallback("magnitude", fraction=0.5)
    again = pickle.loads(pickle.dumps(pruning))
    assert type(again) is PruningCallback
    assert PruningCallback.__module__ == "gflow_pl.callbacks.pruning"
    assert again.state_key == pruning.state_key == "PruningCallback"

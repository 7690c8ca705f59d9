"""Networks that were pruned before: SyncBatchNorm, the twin package, and no PruningCallback at all."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_nets import SmallModule, images, trainer
from torch.utils.data import DataLoader

import gflow_pl
from gflow_pl.callbacks import CarriesStructure, PruningCallback
from gflow_pl.callbacks.lightning.carries_structure import AtomicCheckpointIO


def pruned_module(folder) -> SmallModule:
    torch.manual_seed(0)  # with some weights the branch keeps one filter, which would broadcast over the stream
    module = SmallModule()
    callback = PruningCallback("magnitude", fraction=0.5, rounds=1)
    trainer(folder, max_epochs=2, callbacks=[callback]).fit(module, DataLoader(images(32), batch_size=16))
    return module


def test_expansions_come_back_after_a_conversion_to_sync_batch_norm(tmp_path) -> None:
    module = pruned_module(tmp_path).eval()
    inputs = torch.randn(2, 3, 8, 8)
    expected = module(inputs)
    run, carries = trainer(tmp_path), CarriesStructure()
    carries.setup(run, module, "fit")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    with pytest.raises(RuntimeError):
        converted(inputs)  # the branch is narrower than the stream: its scatter is gone
    carries.on_fit_start(run, converted)
    assert torch.equal(converted(inputs), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_expansions_stay_when_lightning_converts_back_after_training(fails, tmp_path) -> None:
    module = pruned_module(tmp_path).eval()
    inputs = torch.randn(2, 3, 8, 8)
    expected = module(inputs)
    run, carries = trainer(tmp_path, strategy="ddp", sync_batchnorm=True), CarriesStructure()
    carries.setup(run, module, "fit")
    run.strategy._layer_sync.apply(module)
    carries.on_fit_start(run, module)
    # In the order of Lightning: the strategy comes before the callbacks' `teardown`, which a failure leaves out.
    if fails:
        carries.on_exception(run, module, KeyboardInterrupt())
    else:
        carries.on_train_end(run, module)
    run.strategy._layer_sync.revert(module)
    if not fails:
        carries.teardown(run, module, "fit")
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())
    assert torch.equal(module.eval()(inputs), expected)


def test_a_pruned_foreign_module_is_trained_on_without_a_pruning_callback(tmp_path) -> None:
    module = pruned_module(tmp_path)
    run = trainer(tmp_path, max_epochs=1, callbacks=[CarriesStructure()])
    run.fit(module, DataLoader(images(32), batch_size=16))
    run.save_checkpoint(tmp_path / "file.ckpt")
    again = gflow_pl.load_from_checkpoint(SmallModule, tmp_path / "file.ckpt")
    inputs = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.eval()(inputs), module.eval()(inputs))


def twin_module(twin):
    """A module of the twin package."""

    class TwinModule(twin.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = SmallModule().net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return TwinModule()


def test_a_trainer_and_module_of_the_twin_package(tmp_path) -> None:
    twin = pytest.importorskip("lightning.pytorch")

    module = twin_module(twin)
    before = sum(p.numel() for p in module.parameters())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = PruningCallback("loss", fraction=0.5, rounds=1, num_samples=16)
    try:
        run = twin.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback], **quiet)
        run.fit(module, DataLoader(images(32), batch_size=16))
    except Exception as refusal:
        pytest.fail(f"neither works nor is refused in a sentence: {refusal}")
    assert sum(p.numel() for p in module.parameters()) < before
    assert isinstance(run.strategy.checkpoint_io, AtomicCheckpointIO), "its files are never torn either"
    run.save_checkpoint(tmp_path / "file.ckpt")
    saved = torch.load(tmp_path / "file.ckpt", weights_only=True)
    assert saved["gflow_pl"]["structure"]["shapes"]["net.4.weight"] == list(module.net[4].weight.shape)
    assert saved["callbacks"]["PruningCallback"]["rows"] == callback.rows

    # It resumes and refuses like its twin.
    callback = PruningCallback("loss", fraction=0.5, rounds=1, num_samples=16)
    run = twin.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback], **quiet)
    run.fit(again := twin_module(twin), DataLoader(images(32), batch_size=16), ckpt_path=tmp_path / "file.ckpt")
    assert callback.rounds_done == 1
    assert again.net[4].weight.shape == module.net[4].weight.shape
    averaging = twin.callbacks.StochasticWeightAveraging(0.1)
    callbacks = [PruningCallback("loss", fraction=0.5, rounds=1), averaging]
    run = twin.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **quiet)
    with pytest.raises(MisconfigurationException, match="use WeightAveraging"):
        run.fit(twin_module(twin), DataLoader(images(32), batch_size=16))


def test_a_checkpoint_io_that_somebody_chose_stays(tmp_path) -> None:
    class Theirs(TorchCheckpointIO):
        pass

    run = trainer(tmp_path, max_epochs=2, plugins=[Theirs()], callbacks=[PruningCallback("magnitude", fraction=0.5)])
    run.fit(SmallModule(), DataLoader(images(32), batch_size=16))
    assert type(run.strategy.checkpoint_io) is Theirs


@pytest.mark.parametrize("first", ["pruning", "average"])
def test_averaged_models_of_the_twin_package_are_pruned_alike(first, tmp_path) -> None:
    twin = pytest.importorskip("lightning.pytorch")
    average, callback = twin.callbacks.EMAWeightAveraging(decay=0.5), PruningCallback("magnitude", fraction=0.5)

    run = twin.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[callback, average] if first == "pruning" else [average, callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module := twin_module(twin), DataLoader(images(32), batch_size=16))
    assert sum(p.numel() for p in module.parameters()) == callback.rows[-1]["parameters"]

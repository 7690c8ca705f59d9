"""Checkpoints contain the shape of their network and are written atomically; conversions of SyncBatchNorm keep the
structure.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from pytorch_lightning.plugins.io import TorchCheckpointIO
from small_nets import SmallModule, images, trainer
from torch.utils.data import DataLoader

import gflow_pl
from gflow_pl.callbacks import CarriesStructure, PruningCallback
from gflow_pl.callbacks.lightning import carries_structure
from gflow_pl.callbacks.lightning.carries_structure import AtomicCheckpointIO


def pruned_module(folder) -> SmallModule:
    torch.manual_seed(
        0
    )  # with other weights the branch may keep one filter, which would broadcast over the residual stream
    module = SmallModule()
    callback = PruningCallback("magnitude", fraction=0.5, rounds=1)
    trainer(folder, max_epochs=2, callbacks=[callback]).fit(module, DataLoader(images(32), batch_size=16))
    return module


def test_expansions_are_restored_after_a_conversion_to_sync_batch_norm(tmp_path) -> None:
    module = pruned_module(tmp_path).eval()
    inputs = torch.randn(2, 3, 8, 8)
    expected = module(inputs)
    run, carries = trainer(tmp_path), CarriesStructure()
    carries.setup(run, module, "fit")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    carries.on_fit_start(run, converted)
    assert torch.equal(converted(inputs), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_expansions_are_restored_when_lightning_converts_back_after_training(fails, tmp_path) -> None:
    module = pruned_module(tmp_path).eval()
    inputs = torch.randn(2, 3, 8, 8)
    expected = module(inputs)
    run, carries = trainer(tmp_path, strategy="ddp", sync_batchnorm=True), CarriesStructure()
    carries.setup(run, module, "fit")
    run.strategy._layer_sync.apply(module)
    carries.on_fit_start(run, module)
    # Lightning's order: the strategy converts back before the callbacks' `teardown`, which is not called after a
    # failure.
    if fails:
        carries.on_exception(run, module, KeyboardInterrupt())
    else:
        carries.on_train_end(run, module)
    run.strategy._layer_sync.revert(module)
    if not fails:
        carries.teardown(run, module, "fit")
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())
    assert torch.equal(module.eval()(inputs), expected)


def test_a_pruned_module_is_trained_on_without_a_pruning_callback(tmp_path) -> None:
    module = pruned_module(tmp_path)
    run = trainer(tmp_path, max_epochs=1, callbacks=[CarriesStructure()])
    run.fit(module, DataLoader(images(32), batch_size=16))
    run.save_checkpoint(tmp_path / "file.ckpt")
    again = gflow_pl.load_from_checkpoint(SmallModule, tmp_path / "file.ckpt")
    inputs = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.eval()(inputs), module.eval()(inputs))


def test_a_checkpoint_io_chosen_by_the_user_is_kept(tmp_path) -> None:
    class ChosenIO(TorchCheckpointIO):
        pass

    run = trainer(tmp_path, max_epochs=2, plugins=[ChosenIO()], callbacks=[PruningCallback("magnitude", fraction=0.5)])
    run.fit(SmallModule(), DataLoader(images(32), batch_size=16))
    assert type(run.strategy.checkpoint_io) is ChosenIO


def test_a_trainer_writes_checkpoints_atomically(tmp_path, monkeypatch):
    written = []
    save = carries_structure.atomic_save
    monkeypatch.setattr(
        carries_structure, "atomic_save", lambda obj, path: (written.append(str(path)), save(obj, path))
    )
    module, target = SmallModule(), tmp_path / "deep" / "x.ckpt"
    run = trainer(tmp_path, plugins=[AtomicCheckpointIO()])
    run.strategy.connect(module)
    run.save_checkpoint(target)
    assert written == [str(target)]
    assert os.listdir(tmp_path / "deep") == ["x.ckpt"]
    saved = torch.load(target, weights_only=True)["state_dict"]
    assert list(saved) == list(module.state_dict())
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    run.strategy.remove_checkpoint(target)
    assert not target.exists()


KILLED_WHILE_A_TRAINER_SAVES = """
import os, random, signal, sys, time, warnings
import pytorch_lightning as pl
import torch
import gflow_pl
torch.set_num_threads(1)
warnings.simplefilter("ignore")
target = sys.argv[1] + "/x.ckpt"

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2**22))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

callback = gflow_pl.PruningCallback()
trainer = pl.Trainer(callbacks=[callback], logger=False, enable_progress_bar=False, accelerator="cpu")
module = Module()
trainer.strategy.connect(module)
callback.setup(trainer, module, "fit")
random.seed(0)
for kill in range(12):
    child = os.fork()
    if child == 0:
        for step in range(10**6):
            with torch.no_grad():
                module.weight.fill_(step)
            trainer.save_checkpoint(target)
    while not os.path.exists(target):
        time.sleep(0.001)
    time.sleep(random.uniform(0.01, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    weight = torch.load(target, weights_only=True)["state_dict"]["weight"]
    assert (weight == weight[0]).all()
print("complete")
"""


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no other file system to put TMPDIR on")
def test_a_trainer_killed_while_it_saves_leaves_a_complete_file(tmp_path):
    assert os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev
    command = [sys.executable, "-c", KILLED_WHILE_A_TRAINER_SAVES, str(tmp_path)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        environment = {**os.environ, "TMPDIR": elsewhere}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1:] == ["complete"], done.stderr
        assert os.listdir(elsewhere) == []

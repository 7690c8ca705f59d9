import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule

from gflow_pl.callbacks.lightning import carries_structure
from gflow_pl.callbacks.lightning.carries_structure import AtomicCheckpointIO


def test_a_checkpoint_of_a_trainer_goes_through_our_writer(tmp_path, monkeypatch):
    written = []
    save = carries_structure.atomic_save
    monkeypatch.setattr(
        carries_structure, "atomic_save", lambda obj, path: (written.append(str(path)), save(obj, path))
    )
    module, target = SmallModule(), tmp_path / "deep" / "x.ckpt"
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", plugins=[AtomicCheckpointIO()])
    trainer.strategy.connect(module)
    trainer.save_checkpoint(target)
    assert written == [str(target)]
    assert os.listdir(tmp_path / "deep") == ["x.ckpt"]
    saved = torch.load(target, weights_only=True)["state_dict"]
    assert list(saved) == list(module.state_dict())
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    trainer.strategy.remove_checkpoint(target)
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
print("whole")
"""


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no other file system to put TMPDIR on")
def test_a_trainer_killed_while_it_saves_leaves_a_whole_file_wherever_temporary_files_are(tmp_path):
    assert os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev
    command = [sys.executable, "-c", KILLED_WHILE_A_TRAINER_SAVES, str(tmp_path)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        environment = {**os.environ, "TMPDIR": elsewhere}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1:] == ["whole"], done.stderr
        assert os.listdir(elsewhere) == []

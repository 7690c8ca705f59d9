import os

import pytorch_lightning as pl
import torch
from hand_graphs import Plain, assert_equal_states

from gflow_pl.callbacks import checkpoint_io
from gflow_pl.callbacks.checkpoint_io import AtomicCheckpointIO


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Plain()


def test_a_checkpoint_of_a_trainer_goes_through_our_writer(tmp_path, monkeypatch):
    written = []
    save = checkpoint_io.atomic_save
    monkeypatch.setattr(checkpoint_io, "atomic_save", lambda obj, path: (written.append(str(path)), save(obj, path)))
    module, target = Module(), tmp_path / "deep" / "x.ckpt"
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", plugins=[AtomicCheckpointIO()])
    trainer.strategy.connect(module)
    trainer.save_checkpoint(target)
    assert written == [str(target)]
    assert os.listdir(tmp_path / "deep") == ["x.ckpt"]
    assert_equal_states(torch.load(target, weights_only=True)["state_dict"], module.state_dict())
    trainer.strategy.remove_checkpoint(target)
    assert not target.exists()

"""Calibration and validation batches pass through the transfer hooks as in training and validation."""

import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
)

sys.path.insert(0, str(Path(__file__).parent))
from pruning_runs import prune
from small_nets import SmallModule, images, trainer

from gflow_pl import PruningCallback

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def hook(name: str):
    """Return a transfer hook that adds its power of ten to the images."""

    def run(self, batch, *arguments):
        if name == "transfer_batch_to_device":
            batch = super(type(self), self).transfer_batch_to_device(batch, *arguments)
        return batch[0] + 10.0 ** (1 + HOOKS.index(name)), batch[1]

    return run


@pytest.mark.parametrize("owner", ["module", "data"])
def test_transfer_hooks_are_applied_to_calibration_batches(owner, tmp_path) -> None:
    seen = {"training": [], "scoring": []}

    class Sees(SmallModule):
        def training_step(self, batch, batch_idx):
            seen["training" if self.training else "scoring"].append(float(batch[0].mean()))
            return super().training_step((batch[0] / 1000, batch[1]), batch_idx)

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(images(64), batch_size=16, shuffle=True)

    hooks = {name: hook(name) for name in HOOKS}
    module = (type("Hooked", (Sees,), hooks) if owner == "module" else Sees)()
    data = (type("Hooked", (Data,), hooks) if owner == "data" else Data)()
    pruning = PruningCallback("loss", fraction=0.5, rounds=1, num_samples=32)
    trainer(tmp_path, callbacks=[pruning]).fit(module, datamodule=data)
    assert len(seen["scoring"]) >= 4
    for stage in seen.values():
        assert stage == pytest.approx([1110.0] * len(stage), abs=5)


def test_a_transfer_hook_augments_calibration_batches_but_not_validation_batches(tmp_path) -> None:
    """The Trainer's stage and the module's training flag agree in the hook."""
    seen = {"train": set(), "val": set()}

    class Augments(SmallModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            kind = "val" if float(batch[0].mean()) > 100 else "train"
            seen[kind].add((self.trainer.training, self.training, self.trainer.validating))
            if self.trainer.training and self.training:
                return batch[0], torch.full_like(batch[1], 3)
            return batch

        def forward(self, x):
            return super().forward(x - 200 if float(x.mean()) > 100 else x)

    val = images(32)
    val.tensors[0].add_(200)
    pl.seed_everything(0)
    _, pruning = prune(tmp_path, DataLoader(images(64), batch_size=16), Augments(), DataLoader(val, batch_size=16))
    assert seen == {"train": {(True, True, False)}, "val": {(False, False, True)}}
    assert all(row["loss_after"] < 1 for row in pruning.rows), "measured on the labels of training"
    assert all(row["accuracy_after_cut"] == 0.25 for row in pruning.rows), "measured on the labels of validation"


def test_submodules_that_augment_are_in_training_mode_only_for_calibration_batches(tmp_path) -> None:
    """A data set sees the same flag. A submodule that training keeps in evaluation mode stays in evaluation mode."""
    seen: dict[str, set] = {"train": set(), "val": set()}

    class Mixes(nn.Module):
        def forward(self, batch):
            return (batch[0], torch.full_like(batch[1], 3)) if self.training else batch

    class Hooked(SmallModule):
        def __init__(self):
            super().__init__()
            self.mixes, self.frozen = Mixes(), nn.Dropout().eval()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            before = {m: m.training for m in self.modules()}
            assert before[self.mixes] == before[self.net] == self.trainer.training
            assert not before[self.frozen]
            return self.mixes(batch)

        def training_step(self, batch, batch_idx):
            assert batch[1].unique().tolist() == [3]
            return super().training_step(batch, batch_idx)

        def forward(self, x):
            return super().forward(x) + 1000 * torch.eye(4)[3]  # the answer is always 3

    class Looks(Dataset):
        def __init__(self, module, kind):
            self.module, self.kind = module, kind

        def __len__(self):
            return 64

        def __getitem__(self, index):
            seen[self.kind].add(self.module.mixes.training)
            return images(64)[index][0], 0

    module = Hooked()
    train, val = (DataLoader(Looks(module, kind), batch_size=16) for kind in seen)
    _, pruning = prune(tmp_path, train, module, val)
    assert seen == {"train": {True}, "val": {False}}
    assert [row["accuracy_after_cut"] for row in pruning.rows] == [0.0, 0.0]

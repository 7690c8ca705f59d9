"""The best epoch of a resumed run is the best of all its epochs."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gflow_pl.callbacks import BestCheckpoint, LastCheckpoint, RunRecorder


class Scripted(pl.LightningModule):
    """A module with a given validation accuracy in each epoch, whose weight counts the steps."""

    accuracies = (0.5, 0.9, 0.6, 0.7, 0.95)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return -self.weight

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", self.accuracies[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def train(folder: Path, epochs: int, ckpt_path: Path | None = None) -> BestCheckpoint:
    loader = DataLoader(TensorDataset(torch.zeros(1)))
    best = BestCheckpoint(folder)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[RunRecorder(folder), best, LastCheckpoint(folder)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Scripted(), loader, loader, ckpt_path=ckpt_path, weights_only=True)
    return best


def steps_of(file: Path) -> float:
    return torch.load(file, weights_only=True)["state_dict"]["weight"].item()


@pytest.mark.parametrize(("epochs", "best_epoch"), [(4, 1), (5, 4)], ids=["before", "after"])
def test_the_best_epoch_may_be_before_or_after_an_interruption(epochs, best_epoch, tmp_path) -> None:
    train(tmp_path / "first", 3)
    assert steps_of(tmp_path / "first" / "best.ckpt") == 2
    best = train(tmp_path / "second", epochs, tmp_path / "first" / "last.ckpt")
    assert steps_of(tmp_path / "second" / "best.ckpt") == best_epoch + 1
    assert Path(best.best_model_path) == tmp_path / "second" / "best.ckpt"
    assert float(best.best_model_score) == pytest.approx(Scripted.accuracies[best_epoch])
    assert steps_of(tmp_path / "first" / "best.ckpt") == 2, "the first run's file stays as it is"


def test_a_best_file_of_a_later_epoch_than_the_checkpoint_is_not_copied(tmp_path) -> None:
    train(tmp_path / "first", 1)
    early = tmp_path / "early.ckpt"
    early.write_bytes((tmp_path / "first" / "last.ckpt").read_bytes())
    train(tmp_path / "first", 3, tmp_path / "first" / "last.ckpt")
    assert steps_of(tmp_path / "first" / "best.ckpt") == 2, "of the second epoch by now"
    train(tmp_path / "second", 2, early)
    assert steps_of(tmp_path / "second" / "best.ckpt") == 2
    best = train(tmp_path / "third", 1, early)
    assert best.best_model_path == "", "nothing was trained, and the file is not of this epoch"


def test_a_missing_best_file_is_determined_anew(tmp_path) -> None:
    train(tmp_path / "first", 3)
    (tmp_path / "first" / "best.ckpt").unlink()
    train(tmp_path / "second", 4, tmp_path / "first" / "last.ckpt")
    assert steps_of(tmp_path / "second" / "best.ckpt") == 4

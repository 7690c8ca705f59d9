"""A measure that reads no data needs no loss."""

import csv
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule, images, trainer

from gflow_pl import PruningCallback


class Manual(SmallModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class OnlyInTraining(SmallModule):
    """Like a detector, whose network returns losses in training mode only."""

    def training_step(self, batch, batch_idx):
        if not self.net.training:
            raise RuntimeError("no losses in evaluation mode")
        return super().training_step(batch, batch_idx)


def fit(module, folder, measure, **options) -> PruningCallback:
    torch.manual_seed(0)
    pruning = PruningCallback(measure, fraction=0.5, num_samples=16, **options)
    trainer(folder, max_epochs=2, callbacks=[pruning]).fit(module, DataLoader(images(32), batch_size=16))
    return pruning


@pytest.mark.parametrize("measure", ["magnitude", "bn", "random"])
@pytest.mark.parametrize("cls", [Manual, OnlyInTraining])
def test_a_measure_without_data_prunes_without_a_loss(cls, measure, tmp_path) -> None:
    pruning = fit(cls(), tmp_path, measure)
    assert pruning.rows[0]["fraction_reached"] == pytest.approx(0.5, abs=0.05)
    assert {pruning.rows[0][name] for name in ("loss_before", "loss_after", "gradient_norm_after")} == {""}
    with open(tmp_path / "pruning.csv") as file:
        assert next(csv.DictReader(file))["loss_before"] == ""


def test_its_loss_is_measured_where_there_is_one(tmp_path) -> None:
    pruning = fit(Manual(), tmp_path, "magnitude", loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert pruning.rows[0]["loss_before"] > 0


def test_a_measure_of_gradients_still_needs_a_loss(tmp_path) -> None:
    with pytest.raises(ValueError, match="set `loss_fn"):
        fit(Manual(), tmp_path, "loss")
    with pytest.raises(RuntimeError, match="no losses in evaluation mode"):
        fit(OnlyInTraining(), tmp_path, "loss")

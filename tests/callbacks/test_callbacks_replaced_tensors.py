"""A network whose tensors other tools replace between the rounds is traced anew, or refused by name."""

import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Callback, ModelPruning
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule, images, trainer

from gflow_pl import PruningCallback


def fit(module, folder, *others) -> PruningCallback:
    torch.manual_seed(0)
    pruning = PruningCallback("loss", fraction=0.5, rounds=3, num_samples=32)
    run = trainer(folder, max_epochs=5, callbacks=[*others, pruning])
    run.fit(module, DataLoader(images(32), batch_size=16))
    assert pruning.finished
    return pruning


class Parametrizes(Callback):
    """Weight norm from the second epoch on, and a mask that torch.nn.utils.prune makes later."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 2:
            parametrizations.weight_norm(module.net[4])
            trainer.optimizers[0].add_param_group({"params": [*module.net[4].parametrizations.parameters()]})

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 2:
            prune.random_unstructured(module.net[3].conv1, "weight", 0.2)
            trainer.optimizers[0].param_groups[0]["params"].append(module.net[3].conv1.weight_orig)


def test_a_parametrization_and_a_mask_of_later_epochs_are_followed(tmp_path) -> None:
    pruning = fit(module := SmallModule(), tmp_path, Parametrizes())
    assert pruning.graph is not None
    assert all(pruning.graph.shapes[name] == tuple(p.shape) for name, p in module.named_parameters())
    assert module.net[3].conv1.weight_mask.shape == module.net[3].conv1.weight_orig.shape
    assert module.net[4].out_channels == module.net[9].in_features < 12
    assert pruning.rows[-1]["fraction_reached"] == pytest.approx(0.5, abs=0.06)
    assert torch.isfinite(module(images(4)[:][0])).all()
    assert {group.original_size for group in pruning.graph.groups if group.name == "net.4"} <= {
        12,
        pruning.graph.group("net.4").size,
    }


def test_masks_of_lightnings_model_pruning_are_cut_along(tmp_path) -> None:
    other = ModelPruning(
        "l1_unstructured", amount=0.3, use_lottery_ticket_hypothesis=False, make_pruning_permanent=False
    )
    pruning = fit(module := SmallModule(), tmp_path, other)
    assert pruning.graph is not None
    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    assert all(conv.weight_mask.shape == conv.weight_orig.shape for conv in convs)
    assert sum(conv.weight_orig.shape[0] for conv in convs) < 8 + 8 + 8 + 12


def test_a_model_pruning_that_puts_full_weights_back_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(MisconfigurationException, match="ModelPruning puts the initial weights back in full size"):
        fit(SmallModule(), tmp_path, ModelPruning("l1_unstructured", amount=0.3))


def test_a_network_that_does_not_change_is_traced_once(tmp_path, monkeypatch) -> None:
    from gflow_pl.callbacks import pruning as file

    traced = []
    real = file.trace_prunable
    monkeypatch.setattr(file, "trace_prunable", lambda *args: traced.append(0) or real(*args))
    fit(SmallModule(), tmp_path)
    assert len(traced) == 1

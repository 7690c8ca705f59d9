"""A version of Lightning without a private attribute that we need raises an error instead of giving wrong results."""

import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule, images, trainer

from gflow_pl import PruningCallback
from gflow_pl.callbacks.lightning import ranks
from gflow_pl.callbacks.lightning.unsupported import check_supported
from gflow_pl.common.errors import SettingsError


def raises_without(name: str, owner: str):
    return pytest.raises(
        SettingsError, match=f"{owner} of pytorch-lightning {pl.__version__} has no attribute `{name}`"
    )


def test_without_the_start_method_no_launcher_is_accepted(tmp_path) -> None:
    run = trainer(tmp_path, strategy="ddp", devices=2)
    check_supported(run, pruning := PruningCallback(), PruningCallback)
    del run.strategy._start_method
    with raises_without("_start_method", "DDPStrategy"):
        check_supported(run, pruning, PruningCallback)


def test_without_the_layer_sync_norms_are_not_left_synchronized(tmp_path) -> None:
    run = trainer(tmp_path, strategy="ddp", sync_batchnorm=True)
    module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(SmallModule())
    ranks.revert_sync_batch_norm(run, module)
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in module.modules())
    del run.strategy._layer_sync
    with raises_without("_layer_sync", "DDPStrategy"):
        ranks.revert_sync_batch_norm(run, module)


def test_without_the_flag_of_static_graphs_the_wrapper_is_not_rebuilt(tmp_path, monkeypatch) -> None:
    class Wrapper(torch.nn.Module):
        """A DistributedDataParallel that needs no process group."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    monkeypatch.setattr(ranks, "DistributedDataParallel", Wrapper)
    run = trainer(tmp_path, strategy="ddp")
    run.strategy.model = old = Wrapper(SmallModule())
    monkeypatch.setattr(run.strategy, "_setup_model", Wrapper)
    monkeypatch.setattr(run.strategy, "_register_ddp_hooks", lambda: None)
    run.strategy._pl_static_graph_delay_done = True
    ranks.rebuild_ddp(run, old.module)
    assert run.strategy.model is not old
    assert run.strategy.model.module is old.module
    assert run.strategy._pl_static_graph_delay_done is False
    del run.strategy._pl_static_graph_delay_done
    with raises_without("_pl_static_graph_delay_done", "DDPStrategy"):
        ranks.rebuild_ddp(run, old.module)


def test_without_the_mode_of_several_loaders_they_are_not_combined(tmp_path) -> None:
    class RemovesTheMode(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            del trainer.fit_loop._combined_loader._mode

    class TakesADict(SmallModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    loaders = {"a": DataLoader(images(32), batch_size=16), "b": DataLoader(images(32), batch_size=8)}
    with raises_without("_mode", "CombinedLoader"):
        trainer(tmp_path, callbacks=[RemovesTheMode(), PruningCallback("magnitude")]).fit(TakesADict(), loaders)

"""Every checkpoint carries the shape of its network, and is loaded into that shape.

Lightning loads a model before it calls a callback's load hook, so the module itself must do it: the instance's two
checkpoint hooks are wrapped.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import nn
from typing_extensions import override

from gflow_pl.callbacks.checkpoint_io import use_atomic_files
from gflow_pl.callbacks.lightning.packages import averages_of
from gflow_pl.callbacks.lightning.ranks import without_sync_batch_norm
from gflow_pl.surgery import (
    add_structure,
    apply_from_checkpoint,
    apply_structure,
    drop_empty_parameters,
    structure_of,
)
from gflow_pl.values import Structure

__all__ = ["CarriesStructure"]


# Named like the hooks they stand for: a bound method is pickled by its name.


def on_save_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Adds the structure, then does what the class does."""
    add_structure(module, checkpoint)
    type(module).on_save_checkpoint(module, checkpoint)


def on_load_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Takes the file's shape, with the copies that are averaged, then does what the class does."""
    trainer = getattr(module, "_trainer", None)
    for network in (module, *(averages_of(trainer) if trainer is not None else ())):
        apply_from_checkpoint(network, checkpoint)
    type(module).on_load_checkpoint(module, checkpoint)


class CarriesStructure(Callback):
    """Makes every checkpoint of a module carry its network's shape, and load into it, bigger or smaller.

    For networks that were pruned before and are trained, tested or used without a `PruningCallback`, which does the
    same. It needs nothing of the module. The two wrapped hooks stay on the instance: a pruned network that is saved when
    training is over needs its shape in the file as well.
    """

    _structure: Structure | None = None
    _converted = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wraps the module's checkpoint hooks, and has files written whole or not at all."""
        use_atomic_files(trainer)
        self._structure = structure_of(pl_module)
        for hook in (on_save_checkpoint, on_load_checkpoint):
            # Bound: WeightAveraging deep-copies the module, and a copy must speak of itself.
            pl_module.__dict__[hook.__name__] = MethodType(hook, pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes the shape that the module has just taken from a file."""
        self._structure = structure_of(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Brings back what a conversion to SyncBatchNorm lost, and leaves emptied parameters out of the optimizers."""
        self._converted = any(isinstance(m, nn.SyncBatchNorm) for m in pl_module.modules())
        if self._structure is not None and self._converted:
            # The conversion makes new modules, between setup and here, and drops their hooks and buffers.
            apply_structure(pl_module, self._structure)
        drop_empty_parameters(trainer.strategy.optimizers)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the shape; next, Lightning converts SyncBatchNorm back, to new modules once more."""
        self._structure = structure_of(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Brings back what was lost when SyncBatchNorm was converted back."""
        if self._converted and self._structure is not None:
            apply_structure(pl_module, self._structure)
        self._converted = False

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Has SyncBatchNorm converted back now: `teardown` is left out."""
        if self._converted:
            structure = structure_of(pl_module)
            without_sync_batch_norm(trainer, pl_module)
            apply_structure(pl_module, structure)
        self._converted = False

"""Every checkpoint carries the shape of its network, and is loaded into that shape.

Lightning loads a model before it calls a callback's load hook, so the module itself must do it: the instance's two
checkpoint hooks are wrapped.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn
from typing_extensions import override

from gflow_pl.callbacks.lightning.packages import averaged_models, both_packages
from gflow_pl.callbacks.lightning.ranks import revert_sync_batch_norm
from gflow_pl.files import atomic_save
from gflow_pl.surgery import (
    add_structure,
    apply_from_checkpoint,
    apply_structure,
    drop_empty_parameters,
    structure_of,
)
from gflow_pl.values import Structure

__all__ = ["AtomicCheckpointIO", "CarriesStructure", "use_atomic_checkpoint_io"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, syncs it to the disk and renames it over the target.

    Lightning's own writes into the temporary folder and moves the file: where that folder is on another file system the
    move is a copy, and a process killed meanwhile leaves a torn checkpoint. Remote paths (``s3://...``) are Lightning's.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves a checkpoint.

        Args:
            checkpoint: The contents.
            path: The target.
            storage_options: For remote paths only.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            atomic_save(checkpoint, path)


def use_atomic_checkpoint_io(trainer: pl.Trainer) -> None:
    """Put `AtomicCheckpointIO` in the place of Lightning's default; a CheckpointIO that somebody chose stays."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) in both_packages(TorchCheckpointIO):
        strategy.checkpoint_io = AtomicCheckpointIO()


# Named like the hooks they stand for: a bound method is pickled by its name.


def on_save_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Adds the structure, then does what the class does."""
    add_structure(module, checkpoint)
    type(module).on_save_checkpoint(module, checkpoint)


def on_load_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Takes the file's shape, with the copies that are averaged, then does what the class does."""
    trainer = getattr(module, "_trainer", None)
    for network in (module, *(averaged_models(trainer) if trainer is not None else ())):
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
        use_atomic_checkpoint_io(trainer)
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
            revert_sync_batch_norm(trainer, pl_module)
            apply_structure(pl_module, structure)
        self._converted = False

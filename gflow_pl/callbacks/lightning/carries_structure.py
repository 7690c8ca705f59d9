"""Checkpoints that contain the shape of their network, load into that shape, and are written atomically.

Lightning loads a module's weights before it calls the load hooks of callbacks. The module itself must therefore take
the shape of the file, so the callback wraps two hooks of the module.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn
from typing_extensions import override

from gflow_pl.callbacks.lightning.packages import Callback, attached_trainer, averaged_models, both_packages
from gflow_pl.callbacks.lightning.ranks import revert_sync_batch_norm
from gflow_pl.common.lightning_package import pl
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


class AtomicCheckpointIO(pl.plugins.TorchCheckpointIO):
    """A checkpoint plugin that writes beside the target, syncs the file to the disk and renames it over the target.

    Lightning's default writes into the temporary folder and moves the file to the target. If that folder is on another
    file system, the move is a copy, and a process that is killed meanwhile leaves a damaged checkpoint. Remote paths
    (``s3://...``) are left to Lightning.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Save a checkpoint.

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
    """Replace Lightning's default CheckpointIO by `AtomicCheckpointIO`; leave one that the user has chosen."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) in both_packages(pl.plugins.TorchCheckpointIO):
        strategy.checkpoint_io = AtomicCheckpointIO()


# The wrappers have the names of the hooks that they wrap, since a bound method is pickled by its name.


def on_save_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Add the structure to a checkpoint, then call the hook of the module's class."""
    add_structure(module, checkpoint)
    type(module).on_save_checkpoint(module, checkpoint)


def on_load_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Give the module and its averaged copies the shape of a checkpoint, then call the hook of the module's class."""
    trainer = attached_trainer(module)
    for network in (module, *(averaged_models(trainer) if trainer is not None else ())):
        apply_from_checkpoint(network, checkpoint)
    type(module).on_load_checkpoint(module, checkpoint)


class CarriesStructure(Callback):
    """Store the network's shape in all checkpoints of a module, and give the module the shape of a checkpoint it loads.

    For networks that were pruned before and are now trained, tested or used without a `PruningCallback`, which does the
    same. The module needs no changes. Its two checkpoint hooks stay wrapped after training, since the file of a pruned
    network that is saved later needs the shape as well.
    """

    _structure: Structure | None = None
    _has_sync_batch_norm = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wrap the module's checkpoint hooks, and make the Trainer write checkpoints atomically."""
        use_atomic_checkpoint_io(trainer)
        self._structure = structure_of(pl_module)
        for hook in (on_save_checkpoint, on_load_checkpoint):
            # A bound method: WeightAveraging copies the module deeply, and the copy's hooks must refer to the copy.
            pl_module.__dict__[hook.__name__] = MethodType(hook, pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record the shape that the module has just taken from a file."""
        self._structure = structure_of(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the structure after conversion to SyncBatchNorm, and remove empty parameters from the optimizers."""
        self._has_sync_batch_norm = any(isinstance(m, nn.SyncBatchNorm) for m in pl_module.modules())
        if self._structure is not None and self._has_sync_batch_norm:
            # Between `setup` and this hook the conversion has replaced modules, and dropped their hooks and buffers.
            apply_structure(pl_module, self._structure)
        drop_empty_parameters(trainer.strategy.optimizers)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the shape before Lightning converts SyncBatchNorm back, which replaces modules once more."""
        self._structure = structure_of(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the structure after SyncBatchNorm was converted back."""
        if self._has_sync_batch_norm and self._structure is not None:
            apply_structure(pl_module, self._structure)
        self._has_sync_batch_norm = False

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Convert SyncBatchNorm back and restore the structure, since `teardown` is not called after an exception."""
        if self._has_sync_batch_norm:
            structure = structure_of(pl_module)
            revert_sync_batch_norm(trainer, pl_module)
            apply_structure(pl_module, structure)
        self._has_sync_batch_norm = False

"""Batches to score filters on and to measure the accuracy after a cut, as training and validation would get them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from gflow_pl.callbacks.lightning.loaders import has_length, independent_copy
from gflow_pl.callbacks.lightning.packages import private_attribute
from gflow_pl.common.lightning_package import pl

__all__ = ["calibration_batches", "validation_batches"]

_END = object()


def calibration_batches(trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> Iterable[Any]:
    """Return training batches in a shuffled order, augmented and moved to the device as in training.

    They come from a loader with the data set, collate function and batch size of the train loader, and with the subset
    of a SubsetRandomSampler. Under DDP each rank gets its share. A train loader that is not a DataLoader is copied, and
    iterated in the order and on the share of the data that it chooses.

    Args:
        trainer: The Trainer, whose train loader has been set up.
        module: The module, whose hooks transfer the batches.
        seed: Seed of the order and of the loader's workers.

    Returns:
        An iterable that gives the same batches every time it is iterated.

    Raises:
        SettingsError: The training data cannot be read a second time.
    """
    loaders = tree_map(lambda loader: independent_copy(loader, trainer, seed), trainer.train_dataloader)
    return _TransferredBatches(trainer, module, loaders, training=True)


def validation_batches(
    trainer: pl.Trainer, module: pl.LightningModule, limit: int | float | None
) -> Iterable[Any] | None:
    """Return the validation batches of this rank, in order, moved to the device as in validation.

    Args:
        trainer: The Trainer.
        module: The module, whose hooks transfer the batches.
        limit: Largest number of batches (int) or share of the batches (float), like `Trainer.limit_val_batches`.

    Returns:
        The batches; None if there is not exactly one validation loader, or if it has no length or cannot be read a
        second time.
    """
    loader = trainer.val_dataloaders
    if isinstance(loader, list) and len(loader) == 1:
        loader = loader[0]
    if not isinstance(loader, DataLoader) or not has_length(loader):
        return None
    try:
        own = independent_copy(loader, trainer, None)
    except ValueError:  # the accuracy after a cut is optional: training goes on without it
        return None
    num_batches = len(own) if limit is None else int(limit if isinstance(limit, int) else limit * len(own))
    return islice(_TransferredBatches(trainer, module, own, training=False), min(num_batches, len(own)))


class _TransferredBatches:
    """Batches of loaders, passed through the transfer hooks of module and data module as in training or validation.

    Args:
        trainer: The Trainer.
        module: The module.
        loaders: A loader, or a collection of loaders whose batches are combined like those of training.
        training: Whether the hooks run as in training (which augments) or as in validation.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, loaders: object, *, training: bool) -> None:
        self._trainer, self._module, self._training = trainer, module, training
        self._loaders = loaders
        # The flags during training, saved before scoring clears them: parts that training keeps in evaluation mode stay
        # so.
        self._flags = {submodule: training and submodule.training for submodule in module.modules()}

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._combined())
        while True:
            with self._training_or_validating():
                batch = next(batches, _END)
                if batch is _END:
                    return
                converted = self._trainer.precision_plugin.convert_input(batch)
                # `_on_before_batch_transfer` is private: it applies the hook of that name of the module or the data
                # module. `batch_to_device` applies `transfer_batch_to_device` and `on_after_batch_transfer`.
                converted = self._module._on_before_batch_transfer(converted, dataloader_idx=0)
                transferred = self._trainer.strategy.batch_to_device(converted, dataloader_idx=0)
            yield transferred

    def _combined(self) -> Iterable[Any]:
        """Return the batches of the loader, or the combined batches of several loaders."""
        if not isinstance(self._loaders, (dict, list, tuple)):
            return self._loaders  # type: ignore[return-value]
        # Private: "max_size_cycle", "min_size", ... of training. Without it the loaders would be combined in another
        # way.
        purpose = "combine several loaders as in training"
        combined_loader = private_attribute(self._trainer.fit_loop, "_combined_loader", purpose)
        mode = private_attribute(combined_loader, "_mode", purpose)
        return (batch for batch, _, _ in pl.utilities.CombinedLoader(self._loaders, mode))

    @contextmanager
    def _training_or_validating(self) -> Iterator[None]:
        """Set the Trainer's stage and modules' training flags, which tell data sets and hooks whether to augment."""
        stage = self._trainer.state.stage
        flags = {submodule: submodule.training for submodule in self._flags}
        setattr(self._trainer, "training" if self._training else "validating", True)
        _set_training_flags(self._flags)
        try:
            yield
        finally:
            self._trainer.state.stage = stage
            _set_training_flags(flags)


def _set_training_flags(flags: dict[nn.Module, bool]) -> None:
    for module, training in flags.items():
        module.training = training

"""Files that rebuild the shape of a pruned network: Lightning checkpoints and state dicts with a structure in them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gflow_pl.common.errors import SettingsError
from gflow_pl.files import atomic_save
from gflow_pl.surgery.module_structure import apply_structure, structure_of

if TYPE_CHECKING:
    import pytorch_lightning as pl

    _ModuleHooks = pl.LightningModule
else:
    _ModuleHooks = object  # surgery imports no Lightning; the class is mixed into a LightningModule

__all__ = [
    "StructureMixin",
    "add_structure",
    "apply_from_checkpoint",
    "load_from_checkpoint",
    "load_pruned",
    "save_pruned",
]

_KEY = "gflow_pl"
_Module = TypeVar("_Module", bound="pl.LightningModule")


class StructureMixin(_ModuleHooks):
    """Mixin for LightningModules: checkpoints contain the structure of the network, and loading one restores its shape.

    Put it before ``LightningModule`` in the list of base classes. A class that overrides one of the two hooks must call
    ``super()``.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the structure to a checkpoint."""
        add_structure(self, checkpoint)
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the network the shape of a checkpoint, before Lightning loads the weights."""
        apply_from_checkpoint(self, checkpoint)
        super().on_load_checkpoint(checkpoint)


def add_structure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add the structure of a module to a checkpoint, as plain data under the key ``"gflow_pl"``.

    Args:
        module: The module.
        checkpoint: The checkpoint, changed in place. Other entries under the key stay.
    """
    checkpoint[_KEY] = {**checkpoint.get(_KEY, {}), "version": 1, "structure": structure_of(module).as_dict()}


def apply_from_checkpoint(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a module the shape that a checkpoint was saved in. The weights are not loaded.

    Args:
        module: The module, changed in place.
        checkpoint: Contents of a checkpoint, with a structure or without.

    Raises:
        SettingsError: The structure does not fit the module, or the checkpoint has no structure and its tensors have
            other shapes than those of the module.
    """
    if _KEY in checkpoint:
        apply_structure(module, checkpoint[_KEY]["structure"])
        return
    state: Mapping[str, Any] = checkpoint.get("state_dict", {})
    for name, present in module.state_dict().items():
        found = state.get(name)
        if isinstance(found, Tensor) and isinstance(present, Tensor) and found.shape != present.shape:
            raise SettingsError(
                f"The file holds '{name}' with shape {tuple(found.shape)}, the network has {tuple(present.shape)}, and "
                "the file carries no structure to rebuild it by: load it into a network of that shape, or save it "
                "with PruningCallback, StructureMixin or save_pruned."
            )


def load_from_checkpoint(
    cls: type[_Module], path: str | Path, *, weights_only: bool | None = True, **kwargs: Any
) -> _Module:
    """Load a LightningModule from a checkpoint of a pruned or an unpruned network.

    Like ``cls.load_from_checkpoint``, but the module takes the shape of the file before its weights are loaded. The
    class needs no `StructureMixin`.

    Args:
        cls: A LightningModule class.
        path: File of a Lightning checkpoint.
        weights_only: Load plain data and tensors only. None uses Lightning's default; False loads any object, so use it
            for files that you trust only.
        kwargs: Passed to Lightning: ``map_location``, ``strict``, and the module's hyperparameters.

    Returns:
        The module with the shape and the weights of the file.

    Raises:
        SettingsError: The structure does not fit the module, or the file has none and its tensors have other shapes
            than those of the module.
    """
    with _shape_applied_on_load(cls):
        return cls.load_from_checkpoint(path, weights_only=weights_only, **kwargs)


@contextmanager
def _shape_applied_on_load(cls: type[_Module]) -> Iterator[None]:
    """Extend a class's ``on_load_checkpoint``, inside the context, to apply the structure of the checkpoint first."""
    if issubclass(cls, StructureMixin):
        yield
        return
    # The hook may be inherited: only one that the class defines itself is set again afterwards.
    original = cls.on_load_checkpoint
    own = cls.__dict__.get("on_load_checkpoint")

    @functools.wraps(original)
    def on_load_checkpoint(self: _Module, checkpoint: dict[str, Any]) -> None:
        """Apply the structure of a checkpoint, then call the hook of the class."""
        apply_from_checkpoint(self, checkpoint)
        original(self, checkpoint)

    cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if own is None:
            del cls.on_load_checkpoint
        else:
            cls.on_load_checkpoint = own  # type: ignore[method-assign]


def save_pruned(model: nn.Module, path: str | Path) -> None:
    """Save the state dict of a network together with its structure, as plain data, in one atomic write.

    Args:
        model: The network, pruned or not.
        path: The file.
    """
    contents: dict[str, Any] = {"state_dict": model.state_dict()}
    add_structure(model, contents)
    atomic_save(contents, path)


def load_pruned(
    model: nn.Module, path: str | Path, *, map_location: str | torch.device | dict[str, str] | None = "cpu"
) -> None:
    """Give a network the shape and the weights of a file written by `save_pruned`, in place.

    Args:
        model: A network of the same architecture, of any width.
        path: The file.
        map_location: Device that the tensors of the file are loaded to before they are copied into the network, as in
            ``torch.load``.

    Raises:
        SettingsError: The file was not written by `save_pruned`, or its structure does not fit.
    """
    contents = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(contents, dict) or _KEY not in contents or "state_dict" not in contents:
        raise SettingsError(f"'{path}' is no file of save_pruned: it has no structure and state dict in it.")
    apply_from_checkpoint(model, contents)
    model.load_state_dict(contents["state_dict"])

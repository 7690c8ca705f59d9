"""Files that rebuild their own shape: Lightning checkpoints that carry a structure, and plain state dicts with one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gflow_pl.files import atomic_save
from gflow_pl.surgery.module_structure import apply_structure, structure_of

if TYPE_CHECKING:
    import pytorch_lightning as pl

    _Hooks = pl.LightningModule
else:
    _Hooks = object

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


class StructureMixin(_Hooks):
    """For LightningModules: every checkpoint carries the network's shape and is loaded into that shape.

    Put it before ``LightningModule`` in the list of bases; a class that defines the two hooks itself calls ``super()``'s.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the structure."""
        add_structure(self, checkpoint)
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gives the network the file's shape, before Lightning loads its weights."""
        apply_from_checkpoint(self, checkpoint)
        super().on_load_checkpoint(checkpoint)


def add_structure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Adds the module's structure to a checkpoint, as plain data under ``"gflow_pl"``."""
    checkpoint[_KEY] = {**checkpoint.get(_KEY, {}), "version": 1, "structure": structure_of(module).as_dict()}


def apply_from_checkpoint(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Gives a module the shape that a checkpoint was saved in; its weights are not loaded.

    Raises:
        ValueError: The structure does not fit the module; or the checkpoint carries none and its tensors have other
            shapes than the module's.
    """
    if _KEY in checkpoint:
        apply_structure(module, checkpoint[_KEY]["structure"])
        return
    state: Mapping[str, Any] = checkpoint.get("state_dict", {})
    for name, present in module.state_dict().items():
        found = state.get(name)
        if isinstance(found, Tensor) and isinstance(present, Tensor) and found.shape != present.shape:
            raise ValueError(
                f"The file holds '{name}' with shape {tuple(found.shape)}, the network has {tuple(present.shape)}, and the "
                "file carries no structure to rebuild it by: load it into a network of that shape, or save it with "
                "PruningCallback, StructureMixin or save_pruned."
            )


def load_from_checkpoint(
    cls: type[_Module], path: str | Path, *, weights_only: bool | None = True, **kwargs: Any
) -> _Module:
    """`cls.load_from_checkpoint` for files of pruned networks, and any others, of classes that know nothing of pruning.

    Args:
        cls: A LightningModule class.
        path: File of a Lightning checkpoint.
        weights_only: Load plain data and tensors only; None leaves it to Lightning, False trusts the file.
        kwargs: As in Lightning: ``map_location``, ``strict``, and the module's own hyper-parameters.

    Returns:
        The module with the file's shape and weights.

    Raises:
        ValueError: As `apply_from_checkpoint`.
    """
    with _loading_structure(cls):
        return cls.load_from_checkpoint(path, weights_only=weights_only, **kwargs)


@contextmanager
def _loading_structure(cls: type[Any]) -> Iterator[None]:
    """While it lasts, modules of the class take a checkpoint's shape before its weights."""
    if issubclass(cls, StructureMixin):
        yield
        return
    original = cls.on_load_checkpoint
    own = cls.__dict__.get("on_load_checkpoint")

    @functools.wraps(original)
    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        apply_from_checkpoint(self, checkpoint)
        original(self, checkpoint)

    cls.on_load_checkpoint = on_load_checkpoint
    try:
        yield
    finally:
        if own is None:
            del cls.on_load_checkpoint
        else:
            cls.on_load_checkpoint = own


def save_pruned(model: nn.Module, path: str | Path) -> None:
    """Saves a network's state dict with its structure beside it, as plain data, whole or not at all."""
    contents: dict[str, Any] = {"state_dict": model.state_dict()}
    add_structure(model, contents)
    atomic_save(contents, path)


def load_pruned(model: nn.Module, path: str | Path, *, map_location: Any = "cpu") -> None:
    """Gives a network the shape and the weights of a file by `save_pruned`, in place.

    Args:
        model: A network of the same architecture, of any width.
        path: The file.
        map_location: Where its tensors are loaded before they are copied into the network.

    Raises:
        ValueError: It is no such file, or its structure does not fit.
    """
    contents = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(contents, dict) or _KEY not in contents or "state_dict" not in contents:
        raise ValueError(f"'{path}' is no file of save_pruned: it has no structure and state dict in it.")
    apply_from_checkpoint(model, contents)
    model.load_state_dict(contents["state_dict"])

"""Files that rebuild the shape of a pruned network: Lightning checkpoints and state dicts with a structure in them."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gflow_pl.common.checkpoint_file import read_checkpoint
from gflow_pl.common.classes_in_files import check_hyperparameters
from gflow_pl.common.errors import SettingsError
from gflow_pl.files import atomic_save
from gflow_pl.surgery.module_structure import apply_structure, structure_of
from gflow_pl.surgery.structure_checks import check_shapes_of_file
from gflow_pl.values import Structure

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
    "structure_in_file",
]

_KEY = "gflow_pl"
_lock = threading.RLock()  # a class is changed while a module of it is loaded
_Module = TypeVar("_Module", bound="pl.LightningModule")


class StructureMixin(_ModuleHooks):
    """Mixin for LightningModules: checkpoints contain the structure of the network, and loading one restores its shape.

    Put it before ``LightningModule`` in the list of base classes. A class that overrides one of the two hooks must call
    ``super()``.
    """

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        trust_file: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a module from a checkpoint of a pruned or an unpruned network. See `gflow_pl.load_from_checkpoint`.

        Args:
            checkpoint_path: File of a Lightning checkpoint.
            map_location: Device that the tensors are loaded to, as in ``torch.load``.
            hparams_file: YAML or CSV file of hyperparameters, which replace those of the checkpoint.
            strict: Whether the names of all tensors have to be those of the module.
            weights_only: Load plain data and tensors only. None means True.
            trust_file: Build any class that the hyperparameters of the file name.
            kwargs: Hyperparameters of the module, which replace those of the file.

        Raises:
            SettingsError: The file is damaged, names a class that is not built from files, or does not fit.
        """
        file = _checked_file(checkpoint_path, weights_only, trust_file, kwargs)
        return super().load_from_checkpoint(
            file, map_location, hparams_file, strict, weights_only is not False, **kwargs
        )

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
    state: Mapping[str, Any] = checkpoint.get("state_dict", {})
    if _KEY in checkpoint:
        apply_structure(module, structure_in_file(checkpoint))
        return
    for name, present in module.state_dict().items():
        found = state.get(name)
        if isinstance(found, Tensor) and isinstance(present, Tensor) and found.shape != present.shape:
            raise SettingsError(
                f"The file holds '{name}' with shape {tuple(found.shape)}, the network has {tuple(present.shape)}, and "
                "the file carries no structure to rebuild it by: load it into a network of that shape, or save it "
                "with PruningCallback, StructureMixin or save_pruned."
            )


def structure_in_file(contents: Mapping[str, Any]) -> Structure:
    """Return the structure in the contents of a file.

    Args:
        contents: Contents of a checkpoint, or of a file of `save_pruned`.

    Raises:
        SettingsError: The structure is malformed, or its shapes are not those of the tensors in the file.
    """
    entry = contents[_KEY]
    structure = Structure.from_dict(entry["structure"] if isinstance(entry, Mapping) and "structure" in entry else {})
    check_shapes_of_file(structure, contents.get("state_dict", {}))
    return structure


def load_from_checkpoint(
    cls: type[_Module],
    path: str | Path | IO[bytes],
    *,
    weights_only: bool | None = True,
    trust_file: bool = False,
    **kwargs: Any,
) -> _Module:
    """Load a LightningModule from a checkpoint of a pruned or an unpruned network.

    Like ``cls.load_from_checkpoint``, but the module takes the shape of the file before its weights are loaded, and the
    file cannot choose which code runs. The class needs no `StructureMixin`.

    Args:
        cls: A LightningModule class.
        path: File of a Lightning checkpoint.
        weights_only: Load plain data and tensors only. None means True; False loads any object, so use it for files
            that you trust only.
        trust_file: Build any class that the hyperparameters of the file name. By default only networks of this package
            and model builders of torchvision and timm are built, because a class path can run any code.
        kwargs: Passed to Lightning: ``map_location``, ``strict``, and the module's hyperparameters, which replace those
            of the file.

    Returns:
        The module with the shape and the weights of the file.

    Raises:
        SettingsError: `cls` is no class; the file is damaged, or names a class that is not built from files; the
            structure does not fit the module; or the file has none and its tensors have other shapes than those of the
            module.
    """
    if not isinstance(cls, type):
        raise SettingsError(
            f"load_from_checkpoint builds the module itself: give the class {type(cls).__name__}, not a module of it."
        )
    if issubclass(cls, StructureMixin):
        return cls.load_from_checkpoint(path, weights_only=weights_only, trust_file=trust_file, **kwargs)
    file = _checked_file(path, weights_only, trust_file, kwargs)
    with _lock, _shape_applied_on_load(cls):
        return cls.load_from_checkpoint(file, weights_only=weights_only is not False, **kwargs)


def _checked_file(
    path: str | Path | IO[bytes], weights_only: bool | None, trust_file: bool, given: Mapping[str, Any]
) -> str | Path | IO[bytes]:
    """Return a file that Lightning may load: it is undamaged, and names no class that is not built from files.

    Args:
        path: The file, or the address of a remote one, which is read into memory.
        weights_only: See `load_from_checkpoint`.
        trust_file: See `load_from_checkpoint`.
        given: Hyperparameters that the caller gives.
    """
    file = path
    if isinstance(path, str) and "://" in path:
        import fsspec

        with fsspec.open(path, "rb") as remote:
            file = io.BytesIO(remote.read())
    if weights_only is not False:
        contents = read_checkpoint(file)
        if not trust_file:
            check_hyperparameters(contents, path, given)
    return file


@contextmanager
def _shape_applied_on_load(cls: type[_Module]) -> Iterator[None]:
    """Extend a class's ``on_load_checkpoint``, inside the context, to apply the structure of the checkpoint first."""
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
    contents = read_checkpoint(path, map_location)
    if not isinstance(contents, dict) or _KEY not in contents or "state_dict" not in contents:
        raise SettingsError(f"'{path}' is no file of save_pruned: it has no structure and state dict in it.")
    apply_from_checkpoint(model, contents)
    model.load_state_dict(contents["state_dict"])

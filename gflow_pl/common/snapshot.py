"""Snapshots of modules, tensors and random generators, to undo what a forward pass or a training step changes."""

from __future__ import annotations

import gc
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gflow_pl.common.saved_contents import SavedContents

__all__ = [
    "ModuleSnapshot",
    "TensorSnapshot",
    "garbage_collection_paused",
    "module_snapshots",
    "random_states_restored",
    "restored_afterwards",
    "seed_generators",
]


class ModuleSnapshot:
    """The state of one module (not of its submodules), taken when the snapshot is created.

    `restore` can be called any number of times. It restores:

    - every attribute, including parameters, buffers, hooks and the training flag: attributes that were added are
      deleted, attributes that were replaced or deleted get their former value back;
    - the items of the lists, dicts, sets and deques among the attributes, in place, also of subclasses that refuse
      changes; the attributes of other objects, and modules that are no submodules;
    - the state of the random generators among the attributes;
    - the attributes of a scripted module;
    - with `copy_tensors`, the values of buffers and of tensors that are plain attributes, in place.

    Values of parameters in `known` are never copied. Tensors without storage of their own (meta, nested and inference
    tensors) are restored by reference only.

    Args:
        module: The module.
        exclude: Names of attributes that are neither saved nor restored.
        max_items: See `SavedContents`. A bound keeps the cost low for modules that keep a data set.
        copy_tensors: Whether the values of buffers and of other tensors that are not parameters are copied and
            restored.
        known: ids of parameters whose values are not saved, and of modules that have a snapshot of their own; None for
            the module's own parameters and its children.

    Attributes:
        tensors: The buffers and other tensors found that are not parameters.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> snapshot = ModuleSnapshot(norm, copy_tensors=True)
        >>> output = norm(torch.ones(4, 2))
        >>> snapshot.restore()
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        exclude: Collection[str] = (),
        max_items: int | None = None,
        copy_tensors: bool = False,
        known: Collection[int] | None = None,
    ) -> None:
        self._live_attributes = vars(module)
        self._exclude = exclude
        if known is None:
            known = frozenset(map(id, [*module.children(), *module._parameters.values()]))
        self._attributes = {name: value for name, value in vars(module).items() if name not in exclude}
        self._script_attributes: list[tuple[torch.jit.ScriptModule, str, Any]] = []
        if isinstance(module, torch.jit.ScriptModule):
            # Its attributes live outside of Python, and lists are read as copies.
            self._attributes = dict(self._live_attributes)
            self._script_attributes = [(module, name, module._c.getattr(name)) for name in _script_attributes(module)]
            values: list[object] = [value for _, _, value in self._script_attributes]
        else:
            values = list(self._attributes.values())
        self._contents = SavedContents(values, max_items=max_items, known=known, owner=module)
        self.tensors = self._contents.tensors
        self._values = _tensor_snapshots(self.tensors) if copy_tensors else []

    def check(self) -> None:
        """Restore what it may be impossible to restore, while nothing has changed: raise what `restore` would raise."""
        if self._script_attributes or not self._contents.is_plain:
            self.restore()

    def restore(self) -> None:
        """Restore the module to its state at the time of the snapshot."""
        self._contents.restore()
        live = self._live_attributes
        if self._exclude:
            for name in [name for name in live if name not in self._attributes and name not in self._exclude]:
                del live[name]
        else:
            live.clear()  # much faster than looking for added attributes, in a trace of a large network
        live.update(self._attributes)
        for module, name, value in self._script_attributes:
            module._c.setattr(name, value)
        for values in self._values:
            values.restore(compare=False)


def module_snapshots(model: nn.Module, **options: Any) -> list[ModuleSnapshot]:
    """Return a snapshot of a model and of each of its submodules.

    Args:
        model: The model.
        **options: Passed to `ModuleSnapshot`.
    """
    modules = list(model.modules())
    known = frozenset(map(id, [*modules, *model.parameters()]))
    return [ModuleSnapshot(module, known=known, **options) for module in modules]


def _script_attributes(module: torch.jit.ScriptModule) -> list[str]:
    """Return the names of a scripted module's attributes: no parameters, buffers and submodules."""
    attributes = getattr(module, "_concrete_type", None)
    return [] if attributes is None else list(attributes.get_attributes())


class TensorSnapshot:
    """The values of one tensor, to be restored in place.

    Args:
        tensor: A tensor with storage of its own: no meta, nested or inference tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version, self._values = tensor, tensor._version, tensor.detach().clone()

    @staticmethod
    def is_possible(tensor: Tensor) -> bool:
        """Return whether the values of a tensor can be saved and restored."""
        return not (tensor.is_meta or tensor.is_inference() or tensor.is_nested)

    @torch.no_grad()
    def restore(self, *, compare: bool = True) -> None:
        """Restore the values, also where the tensor was resized or its storage was replaced.

        Args:
            compare: Whether to write only where something has changed, which makes the host wait for the device.
                Without, the values are always written, and the version counter stays: a batch norm in training mode
                does not increase it either, so that it cannot tell what has changed.
        """
        tensor, values = self._tensor, self._values
        if tensor.shape != values.shape:
            tensor.data = values.clone()
        elif not compare:
            tensor.data.copy_(values)
        elif tensor._version != self._version or (tensor.layout == torch.strided and not _is_equal(tensor, values)):
            tensor.copy_(values)


def _tensor_snapshots(tensors: Iterable[Tensor]) -> list[TensorSnapshot]:
    return [TensorSnapshot(tensor) for tensor in tensors if TensorSnapshot.is_possible(tensor)]


def _is_equal(tensor: Tensor, values: Tensor) -> bool:
    """Return whether two tensors are equal, where NaN counts as equal to NaN."""
    return bool(torch.eq(tensor, values).logical_or_((tensor != tensor) & (values != values)).all())


@contextmanager
def restored_afterwards(snapshots: Sequence[ModuleSnapshot], tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore modules, tensors and all global random generators at the end of the block.

    Args:
        snapshots: Snapshots of the modules that the block may change.
        tensors: Tensors whose values are saved now and restored as well.
    """
    contents = _tensor_snapshots(tensors)
    try:
        with random_states_restored():
            yield
    finally:
        with ExitStack() as stack:  # an error in one of them must not keep the others from being restored
            for tensor in contents:
                stack.callback(tensor.restore)
            for snapshot in snapshots:
                stack.callback(snapshot.restore)


@contextmanager
def random_states_restored() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch (CPU, CUDA, MPS) at the end of the block."""
    python, numpy, host = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = torch.cuda.get_rng_state_all() if cuda else []
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(host)
        if cuda:
            torch.cuda.set_rng_state_all(devices)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch; those of CUDA only where CUDA is initialized already."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector for a block that creates many objects and keeps all of them to its end.

    Without a pause the collector would visit these objects over and over and free none.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""Values and storage of tensors, saved to be restored exactly."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gflow_pl.common.snapshot import TensorSnapshot

__all__ = ["StoredValues"]


class StoredValues:
    """The values of tensors, and the memory that holds them, to be restored in place.

    Unlike a `TensorSnapshot` it is for tensors that a training step may point to other memory (``p.data = q.data``):
    restoring never writes into memory that belongs to another tensor. Version counters do not change.

    Args:
        tensors: Tensors; those without storage of their own are left out.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        possible = {id(tensor): tensor for tensor in tensors if TensorSnapshot.is_possible(tensor)}.values()
        self._saved = [(tensor, tensor.data, tensor.detach().clone()) for tensor in possible]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore memory and values; may be called any number of times."""
        for tensor, memory, values in self._saved:
            if tensor.layout != torch.strided:
                tensor.data = values.clone()
                continue
            if tensor.shape != memory.shape or tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory
            tensor.data.copy_(values)

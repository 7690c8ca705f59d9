"""The labels of all tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from gflow_pl.channels.constraints import Constraints, Labels
from gflow_pl.channels.labels import DimLabels, TensorInfo

__all__ = ["LabelTable"]


class LabelTable:
    """Tensor to `TensorInfo`, for the tensors of one forward pass.

    Args:
        constraints: Where the labels of parameters and buffers are allocated.
        names: id of the placeholder of a parameter or buffer to the name of the parameter or buffer.
    """

    def __init__(self, constraints: Constraints, names: Mapping[int, str]) -> None:
        self.constraints, self.names = constraints, names
        self._infos: dict[int, TensorInfo] = {}
        self._alive: list[Tensor] = []  # ids stay unique only while the tensors live

    def known(self, tensor: Tensor) -> TensorInfo | None:
        """Return the entry of a tensor, None if it has none yet."""
        return self._infos.get(id(tensor))

    def info(self, tensor: Tensor) -> TensorInfo:
        """Return the entry of a tensor, which is made at the first call.

        A parameter or buffer gets labels of its own; any other new tensor has none in any dimension.
        """
        known = self._infos.get(id(tensor))
        if known is None:
            name = self.names.get(id(tensor))
            if name is None:
                known = TensorInfo([None] * tensor.ndim)
            else:
                labels: DimLabels = [*self.constraints.labels_of_tensor(name, tensor.shape)]
                known = TensorInfo(labels, zero_dims=frozenset(range(tensor.ndim)))
            self._infos[id(tensor)] = known
            self._alive.append(tensor)
        return known

    def set_labels(
        self,
        tensor: Tensor,
        labels: Sequence[Labels | None],
        zero_dims: Iterable[int] = (),
        *,
        is_activation: bool = False,
        is_uniform: bool = False,
    ) -> None:
        """Replace the entry of a tensor, see `TensorInfo`.

        If an operator writes other values than zeros into a view, the tensor that it is a view of has no zero
        dimensions any more.
        """
        zeros = frozenset(zero_dims)
        known = self._infos.get(id(tensor))
        base = self._infos.get(id(tensor._base)) if known is not None else None
        if known is not None and base is not None and known.zero_dims - zeros:
            base.zero_dims = frozenset()
        self._infos[id(tensor)] = TensorInfo(list(labels), zeros, is_activation, is_uniform)
        self._alive.append(tensor)

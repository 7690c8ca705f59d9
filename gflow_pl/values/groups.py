"""Groups of channels that are removed or expanded together, and the layers and slices that they consist of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

__all__ = ["ChannelGroup", "Expansion", "Layer", "LayerUnits", "Slice"]

Kind = Literal["remove", "expand"]


def _read_only_index(index: np.ndarray, what: str, name: str) -> np.ndarray:
    """Return positions as a read-only int64 table. A table that is one already is not copied.

    Args:
        index: (units, width) positions.
        what: Kind of the object that holds the positions, for the error message.
        name: Name of the tensor or layer, for the error message.
    """
    is_read_only = isinstance(index, np.ndarray) and index.flags.owndata and not index.flags.writeable
    is_ready = is_read_only and index.dtype == np.int64
    table = index if is_ready else np.array(index, dtype=np.int64)
    if table.ndim != 2 or (table.size and np.minimum.reduce(table, axis=None) < 0):
        raise ValueError(
            f"{what} '{name}': positions must be a (units, width) table of numbers >= 0, got shape {table.shape}."
        )
    if not is_ready:
        table.setflags(write=False)
    return table


@dataclass(frozen=True, eq=False)
class Slice:
    """The positions along one dimension of a tensor that belong to the units of a group.

    Attributes:
        tensor: Name of the parameter or buffer as in a state dict, the first of its names if the tensor is tied.
        dim: The dimension.
        index: (units, width) positions along that dimension. Row u belongs to unit u.
    """

    tensor: str
    dim: int
    index: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", _read_only_index(self.index, "Slice of", self.tensor))


@dataclass(frozen=True, eq=False)
class LayerUnits:
    """The filters of a layer that belong to the units of a group.

    Attributes:
        layer: Name of the conv, transposed conv or linear layer, as in ``named_modules()``.
        index: (units, width) output channels of the layer. Row u belongs to unit u.
        votes: Whether the layer's scores count for the unit. A depthwise convolution is a follower and does not vote.
    """

    layer: str
    index: np.ndarray
    votes: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", _read_only_index(self.index, "Units of layer", self.layer))


@dataclass(frozen=True)
class Expansion:
    """Where the kept outputs of an expanded layer are scattered into zeros of the original width.

    Attributes:
        module: Name of the module whose output is scattered: the layer, or the norm that alone reads it.
        dim: Channel dimension of that output.
        width: Original width, which all later layers see.
        gathers: Whether the layer also gathers the channels that it reads, as a grouped convolution does if some of its
            groups are removed and its input keeps its width.
    """

    module: str
    dim: int
    width: int
    gathers: bool = False


@dataclass(frozen=True)
class Layer:
    """A conv, transposed conv or linear layer: a weight whose filters compute channels.

    Attributes:
        name: Name of the module that is called, as in ``named_modules()``. If a module uses the weight itself (with
            `torch.nn.functional.linear`, say), the name of the module that holds the weight, or, if that module holds
            several parameters with two or more dimensions, the name of the weight.
        weight: Name of its weight.
        num_filters: Number of output channels now.
        positions: Number of multiply-accumulates for one example, per element of the weight.
        norm: Name of the norm that reads this layer's output, if there is one.
        reads_input: Whether the layer reads the network's input directly.
        is_output: Whether its outputs are (part of) the model's outputs.
        dim: Dimension of the weight that counts filters.
        bias: Name of its bias, if `is_functional` and if it is known.
        module: Name of the module whose output holds its filters; None if no module returns them.
        output_dim: Dimension of that output, counted from the end.
        is_functional: Whether a module uses the weight itself, so that no call of an `nn.Linear` or of a convolution of
            torch shows the layer.
    """

    name: str
    weight: str
    num_filters: int
    positions: int
    norm: str | None = None
    reads_input: bool = False
    is_output: bool = False
    dim: int = 0
    bias: str | None = None
    module: str | None = None
    output_dim: int | None = None
    is_functional: bool = False


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units of the same layers, which are ranked and pruned alike.

    Attributes:
        name: The first layer that produces the units, with a number behind it from the layer's second group on. It does
            not change over rounds.
        kind: "remove" (a unit is removed from all tensors) or "expand" (its layer loses the filter, and zeros replace
            its output).
        original_size: Number of units when the network was traced. Floors refer to it.
        kept: Numbers of the original units that are present, ascending. Row u of every table in `layers` and `slices`
            is unit ``kept[u]``.
        filters: Number of output channels of conv and linear layers in one unit.
        layers: The layers that produce the units, voting layers first.
        slices: All parts of all tensors that belong to the units.
        expansion: Where the outputs are scattered, for "expand" groups.
        inexact: Reason why the removal of a unit changes what other units compute; None if it is exact.
        follows: Name of the group whose units it keeps, number by number: a copy of the network inside of the module
            (a teacher) is cut like the network. None for every other group. Only groups that follow none are ranked
            and counted.

    Raises:
        ValueError: The parts contradict each other.
    """

    name: str
    kind: Kind
    original_size: int
    kept: tuple[int, ...]
    filters: int
    layers: tuple[LayerUnits, ...]
    slices: tuple[Slice, ...]
    expansion: Expansion | None = None
    inexact: str | None = None
    follows: str | None = None

    def __post_init__(self) -> None:
        where = f"Group '{self.name}'"
        if self.kind not in ("remove", "expand"):
            raise ValueError(f"{where}: kind must be 'remove' or 'expand', got {self.kind!r}.")
        if (self.kind == "expand") != (self.expansion is not None):
            raise ValueError(f"{where}: an 'expand' group needs an expansion, and no other group has one.")
        kept = np.array(self.kept, dtype=np.int64)
        if (np.diff(kept) <= 0).any() or (len(kept) and not 0 <= kept[0] <= kept[-1] < self.original_size):
            raise ValueError(f"{where}: `kept` must ascend within 0..{self.original_size - 1}.")
        parts: tuple[LayerUnits | Slice, ...] = (*self.layers, *self.slices)
        for part in parts:
            if len(part.index) != self.size:
                raise ValueError(f"{where}: {part} has {len(part.index)} units, the group has {self.size}.")

    @property
    def size(self) -> int:
        """Number of units present now."""
        return len(self.kept)

    @property
    def num_filters(self) -> int:
        """Number of filters present now, over all units."""
        return self.size * self.filters

    def with_parts(self, **changes: Any) -> ChannelGroup:
        """Return a copy with some fields changed, which is checked like a new group."""
        return replace(self, **changes)

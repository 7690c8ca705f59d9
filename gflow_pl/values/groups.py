"""Groups of channels that are removed or expanded together, and the layers and slices that they consist of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

__all__ = ["ChannelGroup", "Expansion", "Layer", "LayerUnits", "Slice"]

Kind = Literal["remove", "expand"]


def _frozen_index(index: Any, what: str, name: str) -> np.ndarray:
    """A read-only int64 (units, width) table of positions; what nobody can write into is not copied."""
    flags = index.flags if isinstance(index, np.ndarray) else None
    taken = flags is not None and flags.owndata and not flags.writeable and index.dtype == np.int64
    table = index if taken else np.array(index, dtype=np.int64)
    if table.ndim != 2 or (table.size and np.minimum.reduce(table, axis=None) < 0):
        raise ValueError(
            f"{what} '{name}': positions must be a (units, width) table of numbers >= 0, got shape {table.shape}."
        )
    if not taken:
        table.setflags(write=False)
    return table


@dataclass(frozen=True, eq=False)
class Slice:
    """The positions along one dim of one tensor that the units of a group hold.

    Attributes:
        tensor: State-dict style name of the parameter or buffer (its first owner's, if tied).
        dim: The dim that is cut.
        index: (units, width) positions along that dim; row u belongs to unit u.
    """

    tensor: str
    dim: int
    index: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", _frozen_index(self.index, "Slice of", self.tensor))


@dataclass(frozen=True, eq=False)
class LayerUnits:
    """The output channels of one layer that the units of a group hold.

    Attributes:
        layer: Name of the conv, transposed conv or linear layer, as in ``named_modules()``.
        index: (units, width) output channels of the layer; row u belongs to unit u.
        votes: Whether the layer's scores count for the unit (a depthwise conv follows and does not vote).
    """

    layer: str
    index: np.ndarray
    votes: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", _frozen_index(self.index, "Units of layer", self.layer))


@dataclass(frozen=True)
class Expansion:
    """The place where kept outputs are scattered into zeros of the old width.

    Attributes:
        module: Name of the module whose output is scattered (the norm behind the layer, or the layer).
        dim: Channel dim of that output.
        width: Width of the output that everything downstream sees.
        gathers: Whether the layer reads only some channels of what comes in, too: a grouped convolution whose groups go,
            while its input keeps its width.
    """

    module: str
    dim: int
    width: int
    gathers: bool = False


@dataclass(frozen=True)
class Layer:
    """What the trace learnt of one conv, transposed conv or linear layer that is called as a module.

    Attributes:
        name: As in ``named_modules()``.
        weight: Name of its weight tensor.
        num_filters: Output channels at present.
        positions: Multiply-accumulates of one example per element of the weight.
        norm: Name of the norm layer that reads this layer's output, if there is one.
        reads_input: Whether the layer reads the network's input directly.
        is_output: Whether its outputs are (part of) the model's outputs.
    """

    name: str
    weight: str
    num_filters: int
    positions: int
    norm: str | None = None
    reads_input: bool = False
    is_output: bool = False


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units that are ranked, removed or expanded alike: the channels of layers that belong together.

    Attributes:
        name: Deterministic and stable over rounds: the first layer that produces the group.
        kind: "remove" (the unit goes everywhere) or "expand" (the layer loses it, zeros stand in for it).
        original_size: Units when the graph was traced; floors refer to it.
        kept: Numbers, among the original units, of those still present, ascending; row u of every table
            below is unit ``kept[u]``.
        filters: Output channels of conv and linear layers that one unit holds.
        layers: The layers that produce the units, voters and followers.
        slices: Every part of every tensor that goes with a unit.
        expansion: For "expand" groups, where and how wide the scatter is.
        inexact: Why removing a unit changes what the rest of the network computes, if it does.
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

    def __post_init__(self) -> None:
        where = f"Group '{self.name}'"
        if self.kind not in ("remove", "expand"):
            raise ValueError(f"{where}: kind must be 'remove' or 'expand', got {self.kind!r}.")
        if (self.kind == "expand") != (self.expansion is not None):
            raise ValueError(f"{where}: an 'expand' group, and no other, names its expansion.")
        kept = np.array(self.kept, dtype=np.int64)
        if (np.diff(kept) <= 0).any() or (len(kept) and not 0 <= kept[0] <= kept[-1] < self.original_size):
            raise ValueError(f"{where}: `kept` must ascend within 0..{self.original_size - 1}.")
        parts: tuple[LayerUnits | Slice, ...] = (*self.layers, *self.slices)
        for part in parts:
            if len(part.index) != self.size:
                raise ValueError(f"{where}: {part} speaks of {len(part.index)} units, the group has {self.size}.")

    @property
    def size(self) -> int:
        """Units present now."""
        return len(self.kept)

    @property
    def num_filters(self) -> int:
        """Filters present now: units times the filters that each holds."""
        return self.size * self.filters

    def with_parts(self, **changes: Any) -> ChannelGroup:
        """A copy with some fields changed; the result is checked like a new group."""
        return replace(self, **changes)

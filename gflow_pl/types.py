"""The values that travel between the rooms: groups, scores, plans and structures.

Everything here is small, frozen, checks its contents when it is made, and holds names, integers
or plain tensors; no module and no graph of tensors ever rides along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["ChannelGroup", "Expansion", "KeepPlan", "Layer", "LayerUnits", "Scores", "Slice", "Structure"]

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


class Scores(Mapping[str, Tensor]):
    """Importance of every filter: layer name to a vector over its output channels; higher = keep.

    Raises:
        ValueError: An entry is not a vector, or holds NaN or infinity.
    """

    def __init__(self, scores: Mapping[str, Tensor], *, measure: str = "") -> None:
        for name, vector in scores.items():
            if not isinstance(vector, Tensor) or vector.ndim != 1:
                shape = tuple(getattr(vector, "shape", ()))
                raise ValueError(
                    f"Scores of layer '{name}' must be a vector over its output channels, got shape {shape}."
                )
        bad = self._first_not_finite(scores)
        if bad is not None:
            by = f" by measure '{measure}'" if measure else ""
            raise ValueError(
                f"Scores of layer '{bad}'{by} hold NaN or infinity: the loss or its gradient is not finite on these batches."
            )
        self._scores = dict(scores)
        self.measure = measure

    @staticmethod
    def _first_not_finite(scores: Mapping[str, Tensor]) -> str | None:
        """The first layer with a value that is not finite; one transfer, however many layers."""
        if not scores:
            return None
        names = list(scores)
        device = scores[names[0]].device
        finite = torch.stack([scores[name].isfinite().all().to(device) for name in names]).tolist()
        return next((name for name, ok in zip(names, finite, strict=True) if not ok), None)

    def __getitem__(self, layer: str) -> Tensor:
        return self._scores[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        return f"Scores({self.measure or 'no measure named'}, {len(self)} layers, {sum(v.numel() for v in self.values())} filters)"


class KeepPlan(Mapping[str, Tensor]):
    """Who stays: group name to a bool vector over the units now present (True = keep).

    Attributes:
        asked: What was asked for, as a share of the filters present, or None if it was not a fraction.
        reached: Share of the filters present that the plan takes away, or None if not known. Both are shares of the
            parameters or multiply-accumulates present where the plan was asked for in these.

    Raises:
        ValueError: An entry is not a bool vector.
    """

    def __init__(self, keep: Mapping[str, Tensor], *, asked: float | None = None, reached: float | None = None) -> None:
        for name, vector in keep.items():
            if not isinstance(vector, Tensor) or vector.dtype != torch.bool or vector.ndim != 1:
                raise ValueError(f"Plan of group '{name}' must be a bool vector over its units, got {vector!r:.80}.")
        self._keep = {name: vector.detach().cpu() for name, vector in keep.items()}
        self.asked = asked
        self.reached = reached

    def __getitem__(self, group: str) -> Tensor:
        return self._keep[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keep)

    def __len__(self) -> int:
        return len(self._keep)

    @property
    def num_removed(self) -> int:
        """Units that go, over all groups."""
        return sum(int((~vector).sum()) for vector in self.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a broadcast or a checkpoint."""
        keep = {name: vector.tolist() for name, vector in self.items()}
        return {"version": 1, "keep": keep, "asked": self.asked, "reached": self.reached}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KeepPlan:
        """The plan that `as_dict` described."""
        keep = {name: torch.tensor(bits, dtype=torch.bool) for name, bits in data["keep"].items()}
        return cls(keep, asked=data.get("asked"), reached=data.get("reached"))

    def __repr__(self) -> str:
        return f"KeepPlan({len(self)} groups, {self.num_removed} units go, asked {self.asked}, reached {self.reached})"


_STRUCTURE_KEYS = {"version", "shapes", "attributes", "expansions"}  # files from before there were gathers have none


@dataclass(frozen=True)
class Structure:
    """The shape of a network, as plain data: enough to give a freshly built network the same shape.

    Attributes:
        shapes: Every parameter and buffer by name, with its shape.
        attributes: Module name to the attributes that follow from the shapes (out_channels, num_heads, ...).
        expansions: Module name to ``{"dim": int, "width": int, "index": [int, ...]}``: the module's outputs are
            scattered to these positions of a zero tensor of that width.
        gathers: Module name to the same: the module reads these positions of an input of that width.
    """

    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    expansions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gathers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, shape in self.shapes.items():
            if not isinstance(name, str) or not all(isinstance(n, int) and n >= 0 for n in shape):
                raise ValueError(f"Structure: the shape of '{name}' must be a list of numbers >= 0, got {shape!r}.")
        for name, entry in [*self.expansions.items(), *self.gathers.items()]:
            index, width = entry.get("index"), entry.get("width")
            if not isinstance(width, int) or not isinstance(entry.get("dim"), int) or not isinstance(index, list):
                raise ValueError(
                    f"Structure: the expansion of '{name}' needs 'dim', 'width' and 'index', got {entry!r:.120}."
                )
            if any(not isinstance(i, int) or not 0 <= i < width for i in index) or len(set(index)) != len(index):
                raise ValueError(f"Structure: the expansion of '{name}' scatters outside 0..{width - 1} or twice.")

    def as_dict(self) -> dict[str, Any]:
        """Str, int, list and dict only (loads with ``weights_only=True``), ``version`` first."""
        return {
            "version": 1,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": {name: dict(values) for name, values in self.attributes.items()},
            "expansions": {name: dict(entry) for name, entry in self.expansions.items()},
            "gathers": {name: dict(entry) for name, entry in self.gathers.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Structure:
        """The structure that `as_dict` described.

        Raises:
            ValueError: The data is of another version, or not a structure.
        """
        if not isinstance(data, Mapping) or data.get("version") != 1:
            found = data.get("version") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(
                f"Structure: expected plain data of version 1, got {found!r}; this file needs another gflow_pl."
            )
        missing = _STRUCTURE_KEYS - set(data)
        if missing:
            raise ValueError(f"Structure: the keys {sorted(missing)} are missing.")
        shapes = {name: tuple(shape) for name, shape in data["shapes"].items()}
        attributes, expansions, gathers = (dict(data.get(key, {})) for key in ("attributes", "expansions", "gathers"))
        return cls(shapes=shapes, attributes=attributes, expansions=expansions, gathers=gathers)

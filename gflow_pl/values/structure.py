"""The shape of a network as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Structure"]

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

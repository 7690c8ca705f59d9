"""The pruned shape of a network as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gflow_pl.common.checks import is_whole_number
from gflow_pl.common.errors import SettingsError

__all__ = ["Structure"]

_REQUIRED_KEYS = {"version", "shapes", "attributes", "expansions"}  # "gathers" is missing in old files


@dataclass(frozen=True)
class Structure:
    """Everything that is needed to give a freshly built network the shape of a pruned one.

    Attributes:
        shapes: Name of every parameter and buffer to its shape.
        attributes: Module name to the attributes that follow from the shapes (out_channels, num_heads, ...) and their
            values.
        expansions: Module name to ``{"dim": int, "width": int, "index": [int, ...]}``: the module's outputs are
            scattered to these positions of a zero tensor of that width.
        gathers: Module name to entries of the same form: the module reads these positions of an input of that width.

    Raises:
        SettingsError: A shape, an expansion or a gather is malformed.
    """

    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    expansions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gathers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in ("shapes", "attributes", "expansions", "gathers"):
            entries = getattr(self, kind)
            if not isinstance(entries, Mapping) or not all(isinstance(name, str) for name in entries):
                raise SettingsError(f"Structure: `{kind}` must be a dict by name, got {entries!r:.80}.")
        for name, shape in self.shapes.items():
            if not isinstance(shape, (tuple, list)) or not all(is_whole_number(n) and n >= 0 for n in shape):
                raise SettingsError(
                    f"Structure: the shape of '{name}' must be a list of whole numbers >= 0, got {shape!r:.80}."
                )
        for name, values in self.attributes.items():
            if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
                raise SettingsError(
                    f"Structure: the attributes of '{name}' must be a dict by name, got {values!r:.80}."
                )
        for name, entry in [*self.expansions.items(), *self.gathers.items()]:
            _check_placement(name, entry)

    def as_dict(self) -> dict[str, Any]:
        """Return the structure as strings, numbers, lists and dicts, which load with ``weights_only=True``.

        The key ``version`` comes first.
        """
        return {
            "version": 1,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": {name: dict(values) for name, values in self.attributes.items()},
            "expansions": {name: dict(entry) for name, entry in self.expansions.items()},
            "gathers": {name: dict(entry) for name, entry in self.gathers.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Structure:
        """Return the structure that `as_dict` described.

        Raises:
            SettingsError: The data has another version, or is not a structure.
        """
        if not isinstance(data, Mapping) or data.get("version") != 1 or data["version"] is True:
            found = data.get("version") if isinstance(data, Mapping) else type(data).__name__
            raise SettingsError(
                f"Structure: expected plain data of version 1, got {found!r}; this file needs another version of "
                "gflow_pl."
            )
        missing = _REQUIRED_KEYS - set(data)
        if missing:
            raise SettingsError(f"Structure: the keys {sorted(missing)} are missing.")
        described = cls(**{key: data.get(key, {}) for key in ("shapes", "attributes", "expansions", "gathers")})
        return replace(described, shapes={name: tuple(shape) for name, shape in described.shapes.items()})


def _check_placement(name: str, entry: object) -> None:
    """Raise unless an entry says where the channels of a module are among those of the full width."""
    index, width, dim = (entry.get(key) if isinstance(entry, Mapping) else None for key in ("index", "width", "dim"))
    if not is_whole_number(width) or not is_whole_number(dim) or not isinstance(index, list):
        raise SettingsError(
            f"Structure: the expansion of '{name}' needs 'dim', 'width' and 'index', got {entry!r:.120}."
        )
    if any(not is_whole_number(i) or not 0 <= i < width for i in index) or len(set(index)) != len(index):
        raise SettingsError(f"Structure: the expansion of '{name}' scatters outside 0..{width - 1} or twice.")

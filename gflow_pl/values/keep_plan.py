"""The units of every group that a round keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gflow_pl.common.errors import SettingsError

__all__ = ["KeepPlan"]


class KeepPlan(Mapping[str, Tensor]):
    """The units to keep, a read-only mapping from group names to bool vectors over the units now present.

    Args:
        keep: Group name to (units,) bool, True to keep.
        asked: See the attribute.
        reached: See the attribute.

    Attributes:
        asked: Fraction that was asked for, in [0, 1]; None if the plan was not made for a fraction.
        reached: Fraction that the plan removes, in [0, 1]; None if unknown. Both are shares of the filters present, or
            of the parameters or multiply-accumulates if the plan was made for these.

    Raises:
        SettingsError: An entry is not a bool vector.
    """

    def __init__(self, keep: Mapping[str, Tensor], *, asked: float | None = None, reached: float | None = None) -> None:
        for name, vector in keep.items():
            if not isinstance(vector, Tensor) or vector.dtype != torch.bool or vector.ndim != 1:
                raise SettingsError(f"Plan of group '{name}' must be a bool vector over its units, got {vector!r:.80}.")
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
        """Number of units to remove, over all groups."""
        return sum(int((~vector).sum()) for vector in self.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, for a broadcast or a checkpoint."""
        keep = {name: vector.tolist() for name, vector in self.items()}
        return {"version": 1, "keep": keep, "asked": self.asked, "reached": self.reached}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KeepPlan:
        """Return the plan that `as_dict` described."""
        keep = {name: torch.tensor(bits, dtype=torch.bool) for name, bits in data["keep"].items()}
        return cls(keep, asked=data.get("asked"), reached=data.get("reached"))

    def __repr__(self) -> str:
        counts = f"{len(self)} groups, {self.num_removed} units to remove"
        return f"KeepPlan({counts}, asked {self.asked}, reached {self.reached})"

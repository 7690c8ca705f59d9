"""The decision which units of every group stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["KeepPlan"]


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

"""The importance of every filter, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["Scores"]


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

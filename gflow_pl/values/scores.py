"""The importance scores of all filters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gflow_pl.common.errors import SettingsError

__all__ = ["Scores"]


class Scores(Mapping[str, Tensor]):
    """The importance score of every filter, a read-only mapping from layer names to vectors. Higher means keep.

    Args:
        scores: Layer name to the (filters,) scores of its output channels.
        measure: Name of the measure, for messages.

    Raises:
        SettingsError: An entry is not a vector, or has a NaN or an infinity.
    """

    def __init__(self, scores: Mapping[str, Tensor], *, measure: str = "") -> None:
        for name, vector in scores.items():
            if not isinstance(vector, Tensor) or vector.ndim != 1:
                shape = tuple(getattr(vector, "shape", ()))
                raise SettingsError(
                    f"Scores of layer '{name}' must be a vector over its output channels, got shape {shape}."
                )
        bad = self._first_not_finite(scores)
        if bad is not None:
            by = f" by measure '{measure}'" if measure else ""
            raise SettingsError(
                f"Scores of layer '{bad}'{by} hold NaN or infinity: the loss or its gradient is not finite on these "
                "batches."
            )
        self._scores = dict(scores)
        self.measure = measure

    @staticmethod
    def _first_not_finite(scores: Mapping[str, Tensor]) -> str | None:
        """Return the first layer with a value that is not finite, None if there is none.

        All layers are transferred from their device at once.
        """
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
        num_filters = sum(vector.numel() for vector in self.values())
        return f"Scores({self.measure or 'no measure named'}, {len(self)} layers, {num_filters} filters)"

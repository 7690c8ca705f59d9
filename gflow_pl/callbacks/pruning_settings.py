"""What a callback's arguments may be, and when rounds are cut: epochs from a warm-up, a rhythm or a list."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CutTimes", "check_arguments"]

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "target": ("filters", "parameters", "macs"),
    "residual": ("expand", "remove"),
    "scope": ("global", "layer"),
    "unit_score": ("mean", "sum", "max"),
    "bias": (None, "none", "magnitude", "distance_from_init"),
    "track_order": ("formula", "published"),
}
_WHOLE = {"num_samples": 1, "track_batches": 1, "batches": 1, "seed": 0}
_FLAGS = ("exact_only", "protect_stem", "published_truncation", "reset_best", "evaluate_cuts", "keep_momentum", "track")
_MAY_BE_NONE = ("batches", "keep_momentum", "track", "alpha", "temperature", "prune_lr")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Look at the arguments of `PruningCallback`, each by itself.

    Args:
        given: Name to value; others than the known ones are not looked at.

    Raises:
        ValueError: One is not what it should be; the sentence names it.
    """

    def refuse(name: str, expected: str) -> None:
        raise ValueError(f"`{name}` must be {expected}, got {given[name]!r}.")

    present = {name for name, value in given.items() if not (value is None and name in _MAY_BE_NONE)}
    for name, choices in _CHOICES.items():
        if name in present and given[name] not in choices:
            refuse(name, f"one of {', '.join(map(str, choices))}")
    for name, least in _WHOLE.items():
        if name in present and not (_is_whole(given[name]) and given[name] >= least):
            refuse(name, f"a whole number >= {least}")
    for name in _FLAGS:
        if name in present and not isinstance(given[name], bool):
            refuse(name, "true or false")
    for name in ("temperature", "prune_lr"):
        if name in present and not (_is_number(given[name]) and given[name] > 0):
            refuse(name, "> 0")
    if "alpha" in present and not (_is_number(given["alpha"]) and 0 < given["alpha"] <= 1):
        refuse("alpha", "in (0, 1]")
    if "min_kept" in present and not (_is_number(given["min_kept"]) and 0 <= given["min_kept"] <= 1):
        refuse("min_kept", "in [0, 1]")
    ignore = given.get("ignore")
    if ignore is not None and not (isinstance(ignore, (list, tuple)) and all(isinstance(n, str) for n in ignore)):
        refuse("ignore", 'a list of names such as ["features.0"]')
    for name in ("loss_fn", "logits_fn"):
        if given.get(name) is not None and not callable(given[name]):
            refuse(name, "a function of a module and a batch")
    for name in ("unpruned_path", "rows_path"):
        if not isinstance(given.get(name), (str, os.PathLike, type(None))):
            refuse(name, "the path of a file")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class CutTimes:
    """The epochs, counted from 0, at whose start the rounds are cut.

    Args:
        num_rounds: Rounds, at least 1.
        warmup_epochs: Epochs of training before the first round's own, >= 0.
        every_n_epochs: Epochs of training before each cut, >= 1.
        epochs: The epochs themselves, one a round, ascending; then the two above are not used. 0 is before the first step.

    Raises:
        ValueError: A number is out of range, or `epochs` does not have one entry a round.

    Example:
        >>> CutTimes(3, warmup_epochs=2).epochs
        (3, 4, 5)
    """

    num_rounds: int
    warmup_epochs: int = 0
    every_n_epochs: int = 1
    epochs: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("warmup_epochs", self.warmup_epochs, 0),
            ("every_n_epochs", self.every_n_epochs, 1),
        ):
            if not _is_whole(value) or value < least:
                raise ValueError(f"`{name}` must be a whole number >= {least}, got {value!r}.")
        if self.epochs is None:
            first = self.warmup_epochs + self.every_n_epochs
            epochs = tuple(range(first, first + self.num_rounds * self.every_n_epochs, self.every_n_epochs))
        else:
            if not isinstance(self.epochs, (list, tuple)):
                raise ValueError(f"`epochs` must be a list of epochs such as [0, 3, 9], got {self.epochs!r}.")
            epochs = tuple(self.epochs)
            if any(not _is_whole(epoch) or epoch < 0 for epoch in epochs):
                raise ValueError(f"`epochs` must be whole numbers >= 0, got {list(epochs)}.")
            if list(epochs) != sorted(set(epochs)):
                raise ValueError(f"`epochs` must ascend, got {list(epochs)}.")
            if len(epochs) != self.num_rounds:
                raise ValueError(
                    f"`epochs` names {len(epochs)} cuts, but there are {self.num_rounds} rounds: give one epoch a round."
                )
            if self.warmup_epochs or self.every_n_epochs != 1:
                raise ValueError("`epochs` says when to cut by itself: leave `warmup_epochs` and `every_n_epochs` out.")
        object.__setattr__(self, "epochs", epochs)

    def check_fits(self, max_epochs: int | None) -> None:
        """Refuse a schedule whose last cut no training epoch follows.

        Raises:
            ValueError: Training ends too early; the sentence says what would do.
        """
        assert self.epochs is not None
        last = self.epochs[-1]
        if max_epochs is not None and max_epochs >= 0 and last >= max_epochs:
            raise ValueError(
                f"The last of {self.num_rounds} rounds is due at the start of epoch {last} (counted from 0), but training "
                f"ends after {max_epochs} epochs: set max_epochs to at least {last + 1}, or lower `rounds` or `warmup_epochs`."
            )

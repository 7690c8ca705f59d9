"""When rounds are cut: epochs from a warm-up, a rhythm or a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CutTimes"]


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
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be a whole number >= {least}, got {value!r}.")
        if self.epochs is None:
            first = self.warmup_epochs + self.every_n_epochs
            epochs = tuple(range(first, first + self.num_rounds * self.every_n_epochs, self.every_n_epochs))
        else:
            epochs = tuple(self.epochs)
            if any(isinstance(e, bool) or not isinstance(e, int) or e < 0 for e in epochs):
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

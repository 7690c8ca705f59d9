"""How much goes in which round: fractions only, no scores."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gflow_pl.selection.rounding import floor_count

__all__ = ["PruningSchedule", "round_fraction"]


def round_fraction(k: int, num_rounds: int, fraction: float) -> float:
    """Share of the filters still present that round `k` takes, so that all rounds together take `fraction`.

    With p = `fraction` and n = `num_rounds`, round k takes p / (k p + n (1 - p)); after it the share
    n (1 - p) / (k p + n (1 - p)) of the original filters is left, exactly 1 - p after the last. The first rounds take
    the largest share.

    Args:
        k: Number of the round, from 1 to `num_rounds`.
        num_rounds: Rounds in all, at least 1.
        fraction: Share of the original filters that goes in all rounds together, in (0, 1).

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> [round(round_fraction(k, 3, 0.75), 3) for k in (1, 2, 3)]
        [0.5, 0.333, 0.25]
    """
    _check_rounds(num_rounds)
    _check_fraction("fraction", fraction)
    _check_round(k, num_rounds)
    return fraction / (k * fraction + num_rounds * (1 - fraction))


@dataclass(frozen=True)
class PruningSchedule:
    """Which share of the filters goes in which round.

    Either `fraction` and `rounds` are given (the published schedule, see `round_fraction`), or `thresholds`.

    Args:
        fraction: Share of the original filters that is gone after the last round, in (0, 1).
        rounds: Number of rounds, at least 1; with `thresholds` it may be left out.
        thresholds: Share of the original filters that is gone after each round, ascending in (0, 1), one a round.
        published_truncation: Repeat the published code, which cuts the percentage of filters kept to an integer
            in every round, so that more goes than was asked for (75 % in 25 rounds ends at 18 % kept).

    Raises:
        ValueError: Both or neither of the two ways are given, or a number is out of its range.

    Example:
        >>> schedule = PruningSchedule(0.75, 5)
        >>> [round(schedule.kept_after(k), 3) for k in range(6)]
        [1.0, 0.625, 0.455, 0.357, 0.294, 0.25]
        >>> schedule.target(1, original=2128, present=2128)
        798
    """

    fraction: float | None = None
    rounds: int | None = None
    thresholds: Sequence[float] | None = None
    published_truncation: bool = False

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.thresholds is None):
            given = "neither" if self.fraction is None else "both"
            raise ValueError(
                f"A pruning schedule needs either `fraction` (with `rounds`) or `thresholds`, got {given}."
            )
        if self.thresholds is None:
            assert self.fraction is not None
            _check_fraction("fraction", self.fraction)
            _check_rounds(self.rounds)
            return
        object.__setattr__(self, "thresholds", _checked_thresholds(self.thresholds))
        if self.rounds is not None and self.rounds != len(self.thresholds):
            raise ValueError(
                f"`thresholds` names {len(self.thresholds)} rounds, but `rounds` is {self.rounds}: leave `rounds` out."
            )

    @property
    def num_rounds(self) -> int:
        """Number of rounds."""
        if self.thresholds is not None:
            return len(self.thresholds)
        assert self.rounds is not None
        return self.rounds

    def fraction_of(self, k: int) -> float:
        """Share of the filters present before round `k` that the round takes; k counts from 1."""
        _check_round(k, self.num_rounds)
        if self.published_truncation:
            before, after = self._truncated(k - 1), self._truncated(k)
            return 1 - after / before if before else 0.0
        return self._exact_fraction_of(k)

    def kept_after(self, k: int) -> float:
        """Share of the original filters left after round `k`; 1.0 for k = 0."""
        if k == 0:
            return 1.0
        _check_round(k, self.num_rounds)
        if self.published_truncation:
            return self._truncated(k) / 100
        if self.thresholds is not None:
            return 1 - self.thresholds[k - 1]
        assert self.fraction is not None
        kept = self.num_rounds * (1 - self.fraction)
        return kept / (k * self.fraction + kept)

    def share(self, k: int, original: float, present: float) -> float:
        """Share of what is `present` that must go in round `k` to leave ``kept_after(k)`` of `original`.

        Unlike `fraction_of`, it makes up for what earlier rounds left over or took too much.

        Args:
            k: Number of the round, from 1.
            original: What there was before the first round (filters, parameters or multiply-accumulates).
            present: What there is now, in the same unit.

        Returns:
            A share in [0, 1]; 0 if enough is gone already.
        """
        if present <= 0:
            return 0.0
        return min(max(1 - self.kept_after(k) * original / present, 0.0), 1.0)

    def target(self, k: int, original: int, present: int) -> int:
        """Number of filters to remove in round `k`.

        Counted from the original filters, so that rounding down does not add up over rounds: after round k, if every
        target is met, ``original - floor((1 - kept_after(k)) * original)`` filters are left.

        Args:
            k: Number of the round, from 1.
            original: Filters before the first round.
            present: Filters present now.

        Returns:
            A number in [0, present].
        """
        gone = floor_count((1 - self.kept_after(k)) * original)
        return min(max(present - (original - gone), 0), present)

    def _exact_fraction_of(self, k: int) -> float:
        if self.thresholds is not None:
            before = self.thresholds[k - 2] if k > 1 else 0.0
            return (self.thresholds[k - 1] - before) / (1 - before)
        assert self.fraction is not None
        return round_fraction(k, self.num_rounds, self.fraction)

    def _truncated(self, k: int) -> int:
        """The integer percentage that the published code believes is kept after round `k`."""
        percent = 100
        for past in range(1, k + 1):
            percent = int(percent * (1 - self._exact_fraction_of(past)))
        return percent


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_fraction(name: str, fraction: object) -> None:
    if _is_number(fraction) and 0 < fraction < 1:  # type: ignore[operator]
        return
    raise ValueError(f"`{name}` must be in (0, 1), got {fraction!r}.{percent_hint(fraction)}")


def percent_hint(fraction: object) -> str:
    """What to write instead, for a number that looks like a percentage; empty for any other value."""
    if _is_number(fraction) and 1 < fraction <= 100:  # type: ignore[operator]
        return f" It is a fraction: for {fraction:g} % write {fraction / 100:g}."  # type: ignore[operator]
    return ""


def _check_rounds(rounds: object) -> None:
    try:
        valid = not isinstance(rounds, bool) and operator.index(rounds) >= 1  # type: ignore[arg-type]
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"`rounds` must be a whole number of at least 1, got {rounds!r}.")


def _check_round(k: int, num_rounds: int) -> None:
    if not 1 <= k <= num_rounds:
        raise ValueError(f"Round {k} does not exist: rounds count from 1 to {num_rounds}.")


def _checked_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    if isinstance(thresholds, str) or not isinstance(thresholds, Sequence) or not thresholds:
        raise ValueError(f"`thresholds` must be a list of fractions such as [0.1, 0.5, 0.8], got {thresholds!r}.")
    for value in thresholds:
        _check_fraction("thresholds", value)
    for before, after in pairwise(thresholds):
        if before >= after:
            raise ValueError(
                f"`thresholds` must ascend (each is the share gone after its round), got {after:g} after {before:g}."
            )
    return tuple(float(value) for value in thresholds)

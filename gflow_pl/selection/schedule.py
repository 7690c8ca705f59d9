"""Fraction of the filters that each round of pruning removes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gflow_pl.common.checks import check_flag, is_number
from gflow_pl.common.errors import SettingsError
from gflow_pl.selection.rounding import floor_count

__all__ = ["PruningSchedule", "percent_hint", "round_fraction"]


def round_fraction(k: int, num_rounds: int, fraction: float) -> float:
    """Return the share of the filters still present that round `k` removes, so that all rounds remove `fraction`.

    With p = `fraction` and n = `num_rounds`, round k removes p / (k p + n (1 - p)). After it, the share
    n (1 - p) / (k p + n (1 - p)) of the original filters is left, which is 1 - p after the last round. The first round
    removes the largest share. This is the schedule of the published code.

    Args:
        k: Number of the round, from 1 to `num_rounds`.
        num_rounds: Total number of rounds, at least 1.
        fraction: Share of the original filters that all rounds together remove, in (0, 1).

    Raises:
        SettingsError: A number is out of its range.

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
    """Share of the filters that is removed by the end of each round.

    Either `fraction` and `rounds` are given (the published schedule, see `round_fraction`), or `thresholds`.

    Args:
        fraction: Share of the original filters that is removed by the end of the last round, in (0, 1).
        rounds: Number of rounds, at least 1. May be omitted if `thresholds` is given.
        thresholds: Share of the original filters that is removed by the end of each round, one entry for each round,
            ascending, in (0, 1).
        published_truncation: Truncate the percentage of filters kept to an integer in every round, as the published
            code does. More filters are then removed than asked for: 75 % in 25 rounds leaves 18 %.

    Raises:
        SettingsError: Neither or both of `fraction` and `thresholds` are given, or a number is out of its range.

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
        check_flag("published_truncation", self.published_truncation)
        if (self.fraction is None) == (self.thresholds is None):
            given = "neither" if self.fraction is None else "both"
            raise SettingsError(
                f"A pruning schedule needs either `fraction` (with `rounds`) or `thresholds`, got {given}."
            )
        # The published schedule.
        if self.thresholds is None:
            assert self.fraction is not None
            _check_fraction("fraction", self.fraction)
            _check_rounds(self.rounds)
            return
        # Thresholds.
        object.__setattr__(self, "thresholds", _checked_thresholds(self.thresholds))
        if self.rounds is not None and self.rounds != len(self.thresholds):
            raise SettingsError(
                f"`thresholds` names {len(self.thresholds)} rounds, but `rounds` is {self.rounds}: leave `rounds` out."
            )

    @property
    def num_rounds(self) -> int:
        """Number of rounds."""
        if self.thresholds is not None:
            return len(self.thresholds)
        assert self.rounds is not None
        return self.rounds

    def kept_after(self, k: int) -> float:
        """Return the share of the original filters that is left after round `k`; 1.0 for k = 0.

        The share follows from the thresholds if there are any, otherwise from the schedule of the paper: with n rounds
        and a final fraction f, round k leaves n (1 - f) / (k f + n (1 - f)).
        """
        if k == 0:
            return 1.0
        _check_round(k, self.num_rounds)
        if self.published_truncation:
            return self._truncated_percentage(k) / 100
        if self.thresholds is not None:
            return 1 - self.thresholds[k - 1]
        assert self.fraction is not None
        kept = self.num_rounds * (1 - self.fraction)
        return kept / (k * self.fraction + kept)

    def share(self, k: int, original: float, present: float) -> float:
        """Return the share of what is present that round `k` must remove to leave ``kept_after(k)`` of the original.

        The share refers to what is actually present, so it corrects for earlier rounds that removed too little or too
        much.

        Args:
            k: Number of the round, from 1.
            original: Amount before the first round, in filters, parameters or multiply-accumulates.
            present: Amount now, in the same unit.

        Returns:
            A share in [0, 1]; 0 if enough is removed already.
        """
        if present <= 0:
            return 0.0
        return min(max(1 - self.kept_after(k) * original / present, 0.0), 1.0)

    def target(self, k: int, original: int, present: int) -> int:
        """Return the number of filters to remove in round `k`.

        The number refers to the original filters, so that rounding errors do not add up over rounds: if every round
        meets its target, ``original - floor((1 - kept_after(k)) * original)`` filters are left after round k.

        Args:
            k: Number of the round, from 1.
            original: Number of filters before the first round.
            present: Number of filters now.

        Returns:
            A number in [0, present].
        """
        removed = floor_count((1 - self.kept_after(k)) * original)
        return min(max(present - (original - removed), 0), present)

    def _truncated_percentage(self, k: int) -> int:
        """Return the percentage of filters left after round `k`, truncated to an integer as in the authors' code."""
        percent = 100
        for past in range(1, k + 1):
            percent = int(percent * (1 - self._untruncated_fraction(past)))
        return percent

    def _untruncated_fraction(self, k: int) -> float:
        """Return the share of the filters present before round `k` that the round removes, without truncation."""
        if self.thresholds is not None:
            before = self.thresholds[k - 2] if k > 1 else 0.0
            return (self.thresholds[k - 1] - before) / (1 - before)
        assert self.fraction is not None
        return round_fraction(k, self.num_rounds, self.fraction)


def _check_fraction(name: str, fraction: object) -> None:
    """Raise unless a setting is a number in (0, 1)."""
    if is_number(fraction) and 0 < fraction < 1:
        return
    raise SettingsError(f"`{name}` must be in (0, 1), got {fraction!r}.{percent_hint(fraction)}")


def percent_hint(fraction: object) -> str:
    """Return a hint with the fraction to write, for a number that looks like a percentage; "" for any other value."""
    if is_number(fraction) and 1 < fraction <= 100:
        return f" It is a fraction: for {fraction:g} % write {fraction / 100:g}."
    return ""


def _check_rounds(rounds: object) -> None:
    """Raise unless the number of rounds is a whole number, at least 1."""
    try:
        valid = not isinstance(rounds, bool) and operator.index(rounds) >= 1  # type: ignore[arg-type]
    except TypeError:
        valid = False
    if not valid:
        raise SettingsError(f"`rounds` must be a whole number of at least 1, got {rounds!r}.")


def _check_round(k: int, num_rounds: int) -> None:
    """Raise unless `k` is one of the rounds 1 to `num_rounds`."""
    if not 1 <= k <= num_rounds:
        raise SettingsError(f"Round {k} does not exist: rounds count from 1 to {num_rounds}.")


def _checked_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    """Return the thresholds as a tuple of floats; raise unless they are an ascending list of numbers in (0, 1)."""
    if isinstance(thresholds, str) or not isinstance(thresholds, Sequence) or not thresholds:
        raise SettingsError(f"`thresholds` must be a list of fractions such as [0.1, 0.5, 0.8], got {thresholds!r}.")
    for value in thresholds:
        _check_fraction("thresholds", value)
    for before, after in pairwise(thresholds):
        if before >= after:
            raise SettingsError(
                f"`thresholds` must ascend (each is the share removed by the end of its round), got {after:g} after "
                f"{before:g}."
            )
    return tuple(float(value) for value in thresholds)

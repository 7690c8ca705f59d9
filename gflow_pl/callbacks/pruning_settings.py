"""The settings of a PruningCallback: small frozen objects that check their values, and attributes to change them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeAlias, TypeVar, overload

from gflow_pl.common.checks import (
    check_choice,
    check_flag,
    check_function,
    check_names,
    check_path,
    check_positive,
    check_share,
    check_whole_number,
    is_whole_number,
)
from gflow_pl.common.errors import SettingsError
from gflow_pl.importance import Importance, resolve_measure
from gflow_pl.importance.gradients import LogitsFn, LossFn
from gflow_pl.values.choices import Bias, Residual, Scope, Target, TrackOrder, UnitScore

__all__ = [
    "CutTimes",
    "PathLike",
    "RoundSettings",
    "ScoringSettings",
    "SelectionSettings",
    "SettingAttributes",
    "TraceSettings",
    "TrackingSettings",
]

PathLike: TypeAlias = str | os.PathLike[str]

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class ScoringSettings:
    """Settings of the scores: the measure, its loss and its batches. Fields as in `PruningCallback`.

    Raises:
        SettingsError: A value is out of its range.
    """

    measure: Importance
    num_samples: int = 2560
    batches: int | None = None
    temperature: float | None = None
    bias: Bias | None = None
    loss_fn: LossFn | None = None
    logits_fn: LogitsFn | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "measure", resolve_measure(self.measure))
        check_whole_number("num_samples", self.num_samples, 1)
        check_whole_number("seed", self.seed, 0)
        if self.batches is not None:
            check_whole_number("batches", self.batches, 1)
        if self.temperature is not None:
            check_positive("temperature", self.temperature)
        if self.bias is not None:
            check_choice("bias", self.bias, Bias)
        if self.loss_fn is not None:
            check_function("loss_fn", self.loss_fn)
        if self.logits_fn is not None:
            check_function("logits_fn", self.logits_fn)


@dataclass(frozen=True)
class TrackingSettings:
    """Settings of scores that are averaged over training steps. Fields as in `PruningCallback`.

    Raises:
        SettingsError: A value is out of its range.
    """

    track: bool = False
    track_batches: int = 20
    alpha: float = 0.8
    track_order: TrackOrder = "formula"

    def __post_init__(self) -> None:
        check_flag("track", self.track)
        check_whole_number("track_batches", self.track_batches, 1)
        check_share("alpha", self.alpha, excludes_zero=True)
        check_choice("track_order", self.track_order, TrackOrder)


@dataclass(frozen=True)
class TraceSettings:
    """Settings of the trace. Fields as in `PruningCallback`.

    Raises:
        SettingsError: A value is not one of the choices.
    """

    residual: Residual = "expand"
    exact_only: bool = False

    def __post_init__(self) -> None:
        check_choice("residual", self.residual, Residual)
        check_flag("exact_only", self.exact_only)


@dataclass(frozen=True)
class SelectionSettings:
    """Settings of the selection: which units may be cut, and how scores compare. Fields as in `PruningCallback`.

    Raises:
        SettingsError: A value is out of its range.
    """

    target: Target = "filters"
    min_kept: float = 0.05
    scope: Scope = "global"
    unit_score: UnitScore = "mean"
    ignore: list[str] = field(default_factory=list)
    protect_stem: bool = True

    def __post_init__(self) -> None:
        check_choice("target", self.target, Target)
        check_share("min_kept", self.min_kept)
        check_choice("scope", self.scope, Scope)
        check_choice("unit_score", self.unit_score, UnitScore)
        check_names("ignore", self.ignore)
        check_flag("protect_stem", self.protect_stem)
        object.__setattr__(self, "ignore", list(self.ignore))  # the caller's list may change later


@dataclass(frozen=True)
class RoundSettings:
    """Further settings of a round: optimizer state, learning rate, evaluation and files.

    The fields are as in `PruningCallback`.

    Raises:
        SettingsError: A value is out of its range.
    """

    keep_momentum: bool = False
    prune_lr: float | None = None
    reset_best: bool = True
    evaluate_cuts: bool = True
    unpruned_path: PathLike | None = None
    rows_path: PathLike | None = None

    def __post_init__(self) -> None:
        check_flag("keep_momentum", self.keep_momentum)
        check_flag("reset_best", self.reset_best)
        check_flag("evaluate_cuts", self.evaluate_cuts)
        if self.prune_lr is not None:
            check_positive("prune_lr", self.prune_lr)
        if self.unpruned_path is not None:
            check_path("unpruned_path", self.unpruned_path)
        if self.rows_path is not None:
            check_path("rows_path", self.rows_path)


class _Setting(Generic[_Value]):
    """A field of a frozen settings object, as an attribute of the callback that holds the object.

    Setting the attribute replaces the object by a copy with the new value, which is checked as at construction.

    Args:
        holder: Name of the callback's attribute that holds the settings object.
    """

    def __init__(self, holder: str) -> None:
        self._holder = holder

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, callback: None, owner: type) -> _Setting[_Value]: ...

    @overload
    def __get__(self, callback: object, owner: type) -> _Value: ...

    def __get__(self, callback: object | None, owner: type) -> _Setting[_Value] | _Value:
        if callback is None:
            return self
        value: _Value = getattr(getattr(callback, self._holder), self._name)
        return value

    def __set__(self, callback: object, value: _Value) -> None:
        changed = replace(getattr(callback, self._holder), **{self._name: value})
        setattr(callback, self._holder, changed)


class SettingAttributes:
    """The settings of a `PruningCallback` as attributes.

    They can be changed until training starts. A wrong value raises a `SettingsError`, as at construction.
    """

    scoring_settings: ScoringSettings
    tracking_settings: TrackingSettings
    trace_settings: TraceSettings
    selection_settings: SelectionSettings
    round_settings: RoundSettings

    measure = _Setting[Importance]("scoring_settings")
    num_samples = _Setting[int]("scoring_settings")
    batches = _Setting[int | None]("scoring_settings")
    temperature = _Setting[float | None]("scoring_settings")
    bias = _Setting[Bias | None]("scoring_settings")
    loss_fn = _Setting[LossFn | None]("scoring_settings")
    logits_fn = _Setting[LogitsFn | None]("scoring_settings")
    seed = _Setting[int]("scoring_settings")

    track = _Setting[bool]("tracking_settings")
    track_batches = _Setting[int]("tracking_settings")
    alpha = _Setting[float]("tracking_settings")
    track_order = _Setting[TrackOrder]("tracking_settings")

    residual = _Setting[Residual]("trace_settings")
    exact_only = _Setting[bool]("trace_settings")

    target = _Setting[Target]("selection_settings")
    min_kept = _Setting[float]("selection_settings")
    scope = _Setting[Scope]("selection_settings")
    unit_score = _Setting[UnitScore]("selection_settings")
    ignore = _Setting[list[str]]("selection_settings")
    protect_stem = _Setting[bool]("selection_settings")

    keep_momentum = _Setting[bool]("round_settings")
    prune_lr = _Setting[float | None]("round_settings")
    reset_best = _Setting[bool]("round_settings")
    evaluate_cuts = _Setting[bool]("round_settings")
    unpruned_path = _Setting[PathLike | None]("round_settings")
    rows_path = _Setting[PathLike | None]("round_settings")


@dataclass(frozen=True)
class CutTimes:
    """The epochs, counted from 0, at whose start the rounds are cut.

    Args:
        num_rounds: Number of rounds, at least 1.
        warmup_epochs: Epochs of training before the epoch that leads to the first cut, >= 0.
        every_n_epochs: Epochs of training before each cut, >= 1.
        epochs: The epochs themselves, one for each round, ascending, in place of the two above. Epoch 0 is before the
            first step. After construction, the epochs of all rounds, as a tuple.

    Raises:
        SettingsError: A number is out of range, or `epochs` does not have one entry for each round.

    Example:
        >>> CutTimes(3, warmup_epochs=2).epochs
        (3, 4, 5)
    """

    num_rounds: int
    warmup_epochs: int = 0
    every_n_epochs: int = 1
    epochs: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_whole_number("warmup_epochs", self.warmup_epochs, 0)
        check_whole_number("every_n_epochs", self.every_n_epochs, 1)
        if self.epochs is None:
            first = self.warmup_epochs + self.every_n_epochs
            epochs = tuple(range(first, first + self.num_rounds * self.every_n_epochs, self.every_n_epochs))
        else:
            epochs = self._checked_epochs(self.epochs)
        object.__setattr__(self, "epochs", epochs)

    def _checked_epochs(self, epochs: object) -> tuple[int, ...]:
        """Return `epochs` as a tuple; raise if it does not name one epoch for each round."""
        if not isinstance(epochs, (list, tuple)):
            raise SettingsError(f"`epochs` must be a list of epochs such as [0, 3, 9], got {epochs!r}.")
        if any(not is_whole_number(epoch) or epoch < 0 for epoch in epochs):
            raise SettingsError(f"`epochs` must be whole numbers >= 0, got {list(epochs)}.")
        if list(epochs) != sorted(set(epochs)):
            raise SettingsError(f"`epochs` must ascend, got {list(epochs)}.")
        if len(epochs) != self.num_rounds:
            raise SettingsError(
                f"`epochs` names {len(epochs)} cuts, but there are {self.num_rounds} rounds: give one epoch for each "
                "round."
            )
        if self.warmup_epochs or self.every_n_epochs != 1:
            raise SettingsError("`epochs` lists all cuts: leave `warmup_epochs` and `every_n_epochs` out.")
        return tuple(epochs)

    def check_fits(self, max_epochs: int | None) -> None:
        """Raise if no training epoch follows the last cut.

        Args:
            max_epochs: Epochs of the Trainer; None or -1 for no limit.

        Raises:
            SettingsError: Training ends too early; the message gives the smallest `max_epochs` that suffices.
        """
        assert self.epochs is not None
        last = self.epochs[-1]
        if max_epochs is not None and max_epochs >= 0 and last >= max_epochs:
            raise SettingsError(
                f"The last of {self.num_rounds} rounds is due at the start of epoch {last} (counted from 0), but "
                f"training ends after {max_epochs} epochs: set max_epochs to at least {last + 1}, or lower `rounds` or "
                "`warmup_epochs`."
            )

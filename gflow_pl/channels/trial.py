"""One trial of a verification: a forward pass in both modes without some labels, compared with the record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.corrections import OperatorIndex
from gflow_pl.channels.expansions import Expansions
from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.pruned_forward import PrunedForward
from gflow_pl.channels.record import Record
from gflow_pl.channels.replay import ReplayMode
from gflow_pl.common.nested import iter_tensors
from gflow_pl.values import SizeAttribute

__all__ = ["Failure", "Removed", "Trial"]

Removed = Mapping[bool, Labels]
"""For every mode (True = training), (labels,) whether a label is removed."""


class Failure(NamedTuple):
    """The first difference between a trial and the record.

    Attributes:
        operator: The operator that failed, or the next one after the error.
        error: The error.
        is_between: Whether the error was raised between two operators, by code of the module that looked at sizes.
    """

    operator: OperatorIndex
    error: Exception
    is_between: bool

    def is_at_or_before(self, other: Failure) -> bool:
        """Return whether this failure comes no later than another one; the pass in training mode runs first."""
        position, limit = ((not index.training, index.number) for index in (self.operator, other.operator))
        return position <= limit


class Trial:
    """Runs the forward without some labels, any number of times.

    Args:
        runner: The model and its inputs.
        record: The record of the model.
        expansions: The layers that are expanded.

    Attributes:
        differing: Of the last run, the operators that were called with other numbers.
    """

    def __init__(self, runner: ForwardRunner, record: Record, expansions: Expansions) -> None:
        self._runner, self._record, self._expansions = runner, record, expansions
        self.differing: list[OperatorIndex] = []

    def run(self, removed: Removed, unchanged: Collection[SizeAttribute] = ()) -> Failure | None:
        """Run the forward in both modes and return the first difference, or None.

        Args:
            removed: The labels to remove.
            unchanged: Numbers of modules that keep their values although they count labels.
        """
        self.differing = []
        for training, operators in self._record.operators.items():
            if training in self._record.errors:
                continue
            pruned = PrunedForward(self._runner, self._record, self._expansions, removed[training], unchanged)
            constraints = self._record.constraints
            replay = ReplayMode(self._runner, pruned.placeholders, operators, constraints, removed[training])
            with pruned.prepared(training):
                try:
                    output = pruned.run(replay)
                    replay.check_end(iter_tensors(output), self._record.output_sources[training])
                except Exception as error:  # a forward may raise anything when sizes do not fit
                    failed_at = min(max(replay.failed_at, 0), len(operators) - 1)
                    return Failure(OperatorIndex(training, failed_at), error, not replay.is_in_operator)
            self.differing += [OperatorIndex(training, number) for number in replay.differing]
        return None

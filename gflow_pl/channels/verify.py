"""Verify a record: remove some units of every group and compare a forward at these smaller shapes with the record."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.corrections import Correction, OperatorIndex
from gflow_pl.channels.expansions import Expansions
from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.grouping import Partition
from gflow_pl.channels.operator_record import OperatorRecord
from gflow_pl.channels.pruned_forward import PrunedForward
from gflow_pl.channels.record import Record
from gflow_pl.channels.replay import Mismatch, ReplayMode

__all__ = ["InexactLabels", "Verifier"]

# Shares of a group's units that the first trial removes. They differ from group to group, so that no size of one group
# is right by chance for another.
_SHARES = (0.37, 0.29, 0.46, 0.22, 0.41, 0.33, 0.26)

InexactLabels = list[tuple[Labels, str]]
"""Label vectors, each with the reason why their removal changes what other channels compute."""


class Verifier:
    """Trial removals of some units of every group.

    A trial runs the forward in both modes without the removed units, and compares every operator with its record: the
    sizes of its outputs have to be those that the labels predict.

    Args:
        runner: The model and its inputs.
        record: The record of the model.
        expansions: The layers that are expanded.
        partition: The units and groups.
    """

    def __init__(self, runner: ForwardRunner, record: Record, expansions: Expansions, partition: Partition) -> None:
        self._runner, self._record, self._expansions, self._partition = runner, record, expansions, partition
        is_removable = np.zeros(record.constraints.num_labels, dtype=bool)
        for roots in partition.unit_roots:
            if len(roots) > 1:
                is_removable[roots] = True
        self._is_removable = is_removable[partition.root]  # (labels,)
        # Of the last trial: (labels,) units that it did not try, and operators that were called with other numbers.
        self._is_skipped = np.zeros(record.constraints.num_labels, dtype=bool)
        self._differing: list[OperatorIndex] = []

    def check_shapes(self) -> Correction | None:
        """Run a forward without some units of all groups, and compare its shapes with those that the labels predict.

        If a rule had to guess, one trial could be right by chance. Two more trials with other numbers of units follow.

        Returns:
            The correction for the first shape that differs, or for the first error of the forward; None without either.
        """
        correction = self._run_trial(exact_only=False)
        differing = self._differing  # of the first trial, for `find_inexact`
        for trial in (1, 2) if self._record.has_guesses and correction is None else ():
            correction = correction or self._run_trial(exact_only=False, trial=trial)
        self._differing = differing
        return correction

    def find_inexact(self) -> tuple[InexactLabels, Correction | None]:
        """Find labels whose removal changes a plain number that an operator is called with (such as a scale).

        Call it after `check_shapes`, whose first trial it continues: the units known to be inexact are excluded, and
        the trial is repeated until no number differs any more.

        Returns:
            The inexact labels beyond those of the record; and the correction that a repeated trial called for, if any.
        """
        inexact: InexactLabels = []
        differing = self._differing
        while differing:
            more = [entry for index in differing for entry in self._inexact_near(index)]
            if not more:
                # The operator runs before all removable channels: its number comes from a layer that runs later.
                reason = _width_reason(self._operator(differing[0]))
                return [*inexact, (np.flatnonzero(self._is_removable), reason)], None
            inexact += more
            correction = self._run_trial(exact_only=True, inexact=inexact)
            if correction is not None:
                return inexact, correction
            differing = self._differing
        return inexact, None

    def _inexact_near(self, index: OperatorIndex) -> InexactLabels:
        """Return the removable labels of an operator or, if it has none that were tried, of the nearest before it."""
        operators = self._record.operators[index.training]
        reason = _width_reason(operators[index.number])
        for operator in reversed(operators[: index.number + 1]):
            removable = [labels for labels in operator.all_labels if self._is_removable[labels].any()]
            if removable and not all(self._is_skipped[labels].all() for labels in removable):
                return [(labels, reason) for labels in removable]
        return []

    def _operator(self, index: OperatorIndex) -> OperatorRecord:
        return self._record.operators[index.training][index.number]

    # -- one trial ---------------------------------------------------------------------------------------------------

    def _run_trial(self, exact_only: bool, inexact: InexactLabels | None = None, trial: int = 0) -> Correction | None:
        """Run the forward in both modes without some units; return the correction for the first error, or None.

        Args:
            exact_only: Whether inexact units are skipped.
            inexact: Further inexact labels to skip.
            trial: Which units are removed, see `_choose_removed`.
        """
        removed = self._choose_removed(exact_only, inexact or [], trial)
        pruned = PrunedForward(self._runner, self._record, self._expansions, removed)
        self._differing = []
        for training, operators in self._record.operators.items():
            if training in self._record.errors:
                continue
            replay = ReplayMode(self._runner, pruned.placeholders, operators, self._record.constraints, removed)
            with pruned.prepared(training):
                try:
                    pruned.run(replay)
                except Exception as error:  # a forward may raise anything when sizes do not fit
                    failed_at = min(max(replay.failed_at, 0), len(operators) - 1)
                    index = OperatorIndex(training, failed_at)
                    return self._correction_for(index, error, is_between=not replay.is_in_operator)
            self._differing += [OperatorIndex(training, number) for number in replay.differing]
        return None

    def _choose_removed(self, exact_only: bool, inexact: InexactLabels, trial: int) -> Labels:
        """Choose the units to remove, and note in `_is_skipped` the inexact ones that stay.

        Trial 0 removes a share of every group, trial 1 one unit of every group, trial 2 units of about half of the
        groups.

        Returns:
            (labels,) whether a label is removed.
        """
        root = self._partition.root
        skipped = np.zeros(self._record.constraints.num_labels, dtype=bool)  # by root
        for labels, _ in inexact:
            skipped[root[labels]] = True
        removed = np.zeros_like(skipped)  # by root
        rng = np.random.default_rng(0)
        for i, (group, roots) in enumerate(zip(self._partition.groups, self._partition.unit_roots, strict=True)):
            share = (_SHARES[i % len(_SHARES)], 0.0, 0.6)[trial]
            num = min(max(1, round(len(roots) * share)), len(roots) - 1) if trial < 2 or rng.random() < 0.5 else 0
            chosen = roots[rng.permutation(len(roots))[:num]]
            if exact_only and group.inexact is not None:
                skipped[roots] = True
            removed[chosen[~skipped[chosen]]] = True
        self._is_skipped = skipped[root]
        return removed[root]

    # -- corrections -------------------------------------------------------------------------------------------------

    def _correction_for(self, index: OperatorIndex, error: Exception, *, is_between: bool) -> Correction:
        """Return what the next recording has to do differently, given an error of a trial.

        Preferably another choice near the error; without one, the labels of the nearest operator with removable
        channels are frozen.

        Args:
            index: The operator that failed, or the next one after the error.
            error: The error.
            is_between: Whether the error was raised between two operators, by code of the module that looked at sizes.
        """
        operators = self._record.operators[index.training]
        failed = operators[index.number]
        reason = str(error) if isinstance(error, Mismatch) else "a size that does not follow the channels"

        # Behind an operator whose output size depends on values, nothing can be compared unless its output is replayed.
        is_replayed = any(operator.output is not None for operator in operators)
        if failed.is_data_dependent and isinstance(error, Mismatch) and not is_between and not is_replayed:
            reason = f"behind '{failed.name}', whose values decide on sizes"
            return Correction(reason, operator=index, freezes_rest=True)

        # A choice at the operator itself; after an error between two operators, the next choice in the same module.
        for operator in operators[index.number :] if is_between else [failed]:
            if operator.module != failed.module:
                break
            if operator.choices_left > 0:
                return Correction(reason, site=operator.site)

        # The nearest earlier choice that concerns the same units.
        targets = self._removable_roots(failed)
        for operator in reversed(operators[: index.number + 1]):
            if operator.choices_left > 0:
                roots = self._removable_roots(operator)
                if len(roots) and (not len(targets) or np.isin(roots, targets).any()):
                    return Correction(reason, site=operator.site)

        # The nearest operator with removable channels, before the error or else after it.
        nearest = (*range(index.number, -1, -1), *range(index.number, len(operators)))
        for number in nearest:
            if self._has_removable(operators[number].all_labels):
                return Correction(reason, operator=OperatorIndex(index.training, number))
        return Correction(reason, operator=index)

    def _has_removable(self, vectors: Sequence[Labels]) -> bool:
        return any(self._is_removable[labels].any() for labels in vectors)

    def _removable_roots(self, operator: OperatorRecord) -> Labels:
        """Return the roots of all removable units among an operator's operands and outputs."""
        removable = [labels[self._is_removable[labels]] for labels in operator.all_labels]
        return np.unique(self._partition.root[np.concatenate([np.zeros(0, np.int64), *removable])])


def _width_reason(operator: OperatorRecord) -> str:
    """Return the reason why units are inexact if an operator's plain number depends on their count."""
    return f"a number that follows the width ('{operator.name}')"

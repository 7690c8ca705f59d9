"""Verify a record: remove some units of every group and compare a forward at these smaller shapes with the record."""

from __future__ import annotations

import numpy as np

from gflow_pl.channels.blame import Blame
from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.corrections import Correction, Corrections, OperatorIndex
from gflow_pl.channels.expansions import Expansions
from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.grouping import Partition
from gflow_pl.channels.operator_record import OperatorRecord
from gflow_pl.channels.record import Record
from gflow_pl.channels.trial import Removed, Trial
from gflow_pl.values import SizeAttribute
from gflow_pl.values.module_sizes import shape_attributes

__all__ = ["InexactLabels", "Verifier"]

# Shares of a group's units that the first trial removes. They differ from group to group, so that no size of one group
# is right by chance for another.
_SHARES = (0.37, 0.29, 0.46, 0.22, 0.41, 0.33, 0.26)

InexactLabels = list[tuple[Labels, str]]
"""Label vectors, each with the reason why their removal changes what other channels compute."""


class Verifier:
    """Trial removals of some units of every group.

    A trial runs the forward in both modes without the removed units, and compares every operator with its record: it
    has to be the same operator on the same tensors, and the sizes of its outputs have to be those that the labels
    predict.

    Args:
        runner: The model and its inputs.
        record: The record of the model.
        expansions: The layers that are expanded.
        partition: The units and groups.
        corrections: The corrections so far.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        record: Record,
        expansions: Expansions,
        partition: Partition,
        corrections: Corrections,
    ) -> None:
        self._runner, self._record, self._partition = runner, record, partition
        self._trial = Trial(runner, record, expansions)
        self._blame = Blame(self._trial, runner.modules, record, partition, corrections)
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
                return [*inexact, (np.flatnonzero(self._blame.is_removable), reason)], None
            inexact += more
            correction = self._run_trial(exact_only=True, inexact=inexact)
            if correction is not None:
                return inexact, correction
            differing = self._differing
        return inexact, None

    def _inexact_near(self, index: OperatorIndex) -> InexactLabels:
        """Return the removable labels of an operator or, if it has none that were tried, of the nearest before it."""
        operators, is_removable = self._record.operators[index.training], self._blame.is_removable
        reason = _width_reason(operators[index.number])
        for operator in reversed(operators[: index.number + 1]):
            removable = [labels for labels in operator.all_labels if is_removable[labels].any()]
            if removable and not all(self._is_skipped[labels].all() for labels in removable):
                return [(labels, reason) for labels in removable]
        return []

    def unneeded_sizes(self) -> set[SizeAttribute]:
        """Return the numbers of modules that count labels, but that the forward can keep as they are.

        Either nothing reads them, or what reads them works with the old value. Attributes of one name and class are
        tried together. Those that follow from the shapes of the module's own tensors are left out.
        """
        by_kind: dict[tuple[object, ...], list[SizeAttribute]] = {}
        for attribute in self._partition.patches:
            module = self._runner.modules[attribute.module]
            shapes = {name: tuple(x.shape) for name, x in module.named_parameters(recurse=False)}
            if attribute.name not in shape_attributes(module, shapes):
                by_kind.setdefault((type(module), attribute.name, attribute.element), []).append(attribute)
        removed = self._choose_removed(False, [], 0) if by_kind else {}
        return {
            attribute
            for attributes in by_kind.values()
            if self._trial.run(removed, attributes) is None
            for attribute in attributes
        }

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
        failure = self._trial.run(removed)
        self._differing = self._trial.differing
        return None if failure is None else self._blame.correction_for(failure, removed)

    def _choose_removed(self, exact_only: bool, inexact: InexactLabels, trial: int) -> Removed:
        """Choose the units to remove, and note in `_is_skipped` the inexact ones that stay.

        Trial 0 removes a share of every group, trial 1 one unit of every group, trial 2 units of about half of the
        groups. In evaluation mode trial 0 removes another number of units than in training mode: most code runs in both
        modes, and what is right by chance for one number is wrong for the other.
        """
        root = self._partition.root
        skipped = np.zeros(self._record.constraints.num_labels, dtype=bool)  # by root
        for labels, _ in inexact:
            skipped[root[labels]] = True
        removed = {training: np.zeros_like(skipped) for training in (True, False)}  # by root
        rng = np.random.default_rng(0)
        for i, (group, roots) in enumerate(zip(self._partition.groups, self._partition.unit_roots, strict=True)):
            share = (_SHARES[i % len(_SHARES)], 0.0, 0.6)[trial]
            num = min(max(1, round(len(roots) * share)), len(roots) - 1) if trial < 2 or rng.random() < 0.5 else 0
            if exact_only and group.inexact is not None:
                skipped[roots] = True
            order = roots[rng.permutation(len(roots))]
            for training, chosen in (
                (True, order[:num]),
                (False, order[: num if trial else _other_number(num, i, len(roots))]),
            ):
                removed[training][chosen[~skipped[chosen]]] = True
        self._is_skipped = skipped[root]
        return {training: by_root[root] for training, by_root in removed.items()}


def _other_number(num: int, group: int, size: int) -> int:
    """Return a number of units to remove in evaluation mode: another one than in training mode, if there is any.

    Args:
        num: Number of units that are removed in training mode.
        group: Number of the group.
        size: Number of its units.
    """
    more = num + 1 + group % 2
    return more if more < size else max(num - 1, min(num, 1))


def _width_reason(operator: OperatorRecord) -> str:
    """Return the reason why units are inexact if an operator's plain number depends on their count."""
    return f"a number that follows the width ('{operator.name}')"

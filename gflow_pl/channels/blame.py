"""Which part of a network a failed trial calls into question, and what the next recording does about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import nn

from gflow_pl.channels.checked_sizes import sizes_checked_before
from gflow_pl.channels.constraints import Labels, TensorDim
from gflow_pl.channels.corrections import Correction, Corrections, OperatorIndex
from gflow_pl.channels.grouping import Partition
from gflow_pl.channels.record import Record
from gflow_pl.channels.replay import FlowMismatch, Mismatch
from gflow_pl.channels.trial import Failure, Removed, Trial
from gflow_pl.values import ChannelGroup

__all__ = ["Blame"]

_UNREPEATABLE = "the forward takes another path at every call"


class Blame:
    """Finds the correction that a failure calls for.

    Preferably another choice near the failure. Without one, labels are frozen: those of the operator that failed or, if
    it has none that can be removed or the path of the forward has changed, those of the groups whose removal makes the
    difference. Further trials with fewer groups find these.

    Args:
        trial: Runs trials.
        modules: Every module of the network by its name.
        record: The record of the model.
        partition: The units and groups.
        corrections: The corrections so far.
    """

    def __init__(
        self,
        trial: Trial,
        modules: Mapping[str, nn.Module],
        record: Record,
        partition: Partition,
        corrections: Corrections,
    ) -> None:
        self._modules = modules
        self._trial, self._record, self._partition, self._corrections = trial, record, partition, corrections
        is_removable = np.zeros(record.constraints.num_labels, dtype=bool)
        for roots in partition.unit_roots:
            if len(roots) > 1:
                is_removable[roots] = True
        self.is_removable = is_removable[partition.root]
        """(labels,) whether a label belongs to a group of several units."""

    def correction_for(self, failure: Failure, removed: Removed) -> Correction:
        """Return what the next recording has to do differently.

        Args:
            failure: The failure of a trial.
            removed: The labels that the trial removed.
        """
        index, error, is_between = failure
        operators = self._record.operators[index.training]
        failed = operators[index.number]
        reason = str(error) if isinstance(error, Mismatch) else "a size that does not follow the channels"

        # Behind an operator whose output size depends on values, nothing can be compared unless its output is replayed.
        is_replayed = any(operator.output is not None for operator in operators)
        if failed.is_data_dependent and isinstance(error, Mismatch) and not is_between and not is_replayed:
            reason = f"behind '{failed.name}', whose values decide on sizes"
            return Correction(reason, failed=index, operator=index, freezes_rest=True)

        # A choice at the operator itself; after an error between two operators, the next choice in the same module.
        targets = self._removable_roots(failed.all_labels)
        has_other_path = isinstance(error, FlowMismatch)
        if self._corrections.allows_choices(index) and not has_other_path:
            for operator in operators[index.number :] if is_between else [failed]:
                if operator.module != failed.module:
                    break
                if operator.choices_left > 0:
                    return Correction(reason, failed=index, site=operator.site)

        # A number of the module that its code compares with the width of a tensor.
        for sizes in sizes_checked_before(error) if is_between and not isinstance(error, Mismatch) else ():
            if self._corrections.allows_sizes(sizes):
                return Correction(reason, failed=index, sizes=sizes)

        # The nearest earlier choice that concerns the same units; a path may depend on an attribute of a later one.
        culprits: list[int] = []
        if has_other_path or not len(targets):
            culprits = self.culprits(failure, removed)
            targets = self._removable_roots([self._partition.unit_roots[number] for number in culprits[:1]])
        if self._corrections.allows_choices(index):
            later = operators[index.number + 1 :] if has_other_path else []
            for operator in [*reversed(operators[: index.number + 1]), *later]:
                if operator.choices_left > 0 and np.isin(self._removable_roots(operator.all_labels), targets).any():
                    return Correction(reason, failed=index, site=operator.site)

        is_known = index in self._corrections.frozen_operators or self._corrections.num_neighbors > 0
        if len(targets) and not culprits and not is_known:
            return Correction(reason, failed=index, operator=index)
        return self.frozen_groups(culprits or self.culprits(failure, removed), index, reason)

    def frozen_groups(self, numbers: Iterable[int], index: OperatorIndex, reason: str) -> Correction:
        """Return the correction that freezes some groups; without any, every group, as the forward is unrepeatable.

        Args:
            numbers: Numbers of the groups.
            index: The operator that failed.
            reason: Reason to report.
        """
        numbers = self._in_all_blocks(numbers, self._record.operators[index.training][index.number].module)
        count = self._corrections.num_neighbors
        groups = [
            group for number in numbers for group in self._partition.groups[max(0, number - count) : number + count + 1]
        ]
        if not groups:
            groups, reason = self._partition.groups, _UNREPEATABLE
        positions = tuple(part for group in groups for part in self._filters(group))
        return Correction(reason, failed=index, positions=positions)

    def _in_all_blocks(self, numbers: Iterable[int], module: str) -> list[int]:
        """Return groups together with those that have the same place in other blocks: blocks run the same code.

        Args:
            numbers: Numbers of the groups.
            module: Name of the module whose forward failed.
        """
        number_of = {group.layers[0].layer: number for number, group in enumerate(self._partition.groups)}
        found = list(numbers)
        for number in tuple(found):
            # The innermost module that contains both the layer and what failed.
            layer = self._partition.groups[number].layers[0].layer
            block = layer
            while block and block != module and not module.startswith(f"{block}."):
                block = block.rpartition(".")[0]
            if block and block != layer and not isinstance(self._modules[block], (nn.Sequential, nn.ModuleList)):
                kind = type(self._modules[block])
                alike = [name for name, other in self._modules.items() if type(other) is kind and name]
                found += [
                    number_of[name + layer[len(block) :]] for name in alike if name + layer[len(block) :] in number_of
                ]
        return list(dict.fromkeys(found))

    def culprits(self, failure: Failure, removed: Removed) -> list[int]:
        """Return the numbers of the groups whose removal causes a failure, in the order in which they were found.

        Args:
            failure: The failure of a trial.
            removed: The labels that the trial removed.
        """
        found: list[int] = []
        others = list(range(len(self._partition.groups)))
        while self._fails(others, failure, removed):
            # Without the first `passing` of the groups all is well; with the first `failing` it is not.
            passing, failing = 0, len(others)
            while failing - passing > 1:
                middle = (passing + failing) // 2
                is_failing = self._fails(others[:middle], failure, removed)
                passing, failing = (passing, middle) if is_failing else (middle, failing)
            if passing == 0 and (not others or self._fails([], failure, removed)):
                return []
            found.append(others.pop(passing))
        return found

    def _fails(self, numbers: Sequence[int], failure: Failure, removed: Removed) -> bool:
        """Return whether a trial that removes labels of these groups only fails, too, at the same place or before it.

        Args:
            numbers: Numbers of the groups.
            failure: The failure of the trial with all groups.
            removed: The labels that that trial removed.
        """
        is_tried = np.zeros(self._record.constraints.num_labels, dtype=bool)  # by root
        for number in numbers:
            is_tried[self._partition.unit_roots[number]] = True
        is_tried = is_tried[self._partition.root]
        found = self._trial.run({training: labels & is_tried for training, labels in removed.items()})
        return found is not None and found.is_at_or_before(failure)

    def _filters(self, group: ChannelGroup) -> list[tuple[TensorDim, Labels]]:
        """Return the positions of a group in the weight of its first layer."""
        weight = self._record.layers[group.layers[0].layer].weight
        return [(TensorDim(p.tensor, p.dim), p.index.ravel()) for p in group.slices if p.tensor == weight]

    def _removable_roots(self, vectors: Sequence[Labels]) -> Labels:
        """Return the roots of all removable units among some label vectors."""
        removable = [labels[self.is_removable[labels]] for labels in vectors]
        return np.unique(self._partition.root[np.concatenate([np.zeros(0, np.int64), *removable])])

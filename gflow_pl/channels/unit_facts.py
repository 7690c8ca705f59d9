"""What is known of every unit: whether it votes, stays, is inexact or expanded, and why."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gflow_pl.channels.constraints import FIXED, Labels, TensorDim
from gflow_pl.channels.expansions import Expansions, connected_labels
from gflow_pl.channels.record import LayerFacts, Record
from gflow_pl.values import SizeAttribute

__all__ = ["Reasons", "UnitFacts", "freeze_shared_expansions", "votes"]

_USED_ELSEWHERE = "its weight is used elsewhere too"
_BY_KEYWORD = "its input is passed by keyword, so that no channels of it can be left out; pass it by position"

Reasons = Sequence[tuple[Labels, str]]
"""Label vectors, each with the reason why its labels stay or are inexact."""


class UnitFacts:
    """Facts about every unit, as arrays that are indexed by the unit's root.

    Attributes:
        root: (labels,) the root of every label.
        frozen_reason: (labels,) position in `frozen_reasons` of the first reason why a unit stays, -1 for none.
        frozen_reasons: The reasons.
        inexact_reason: (labels,) the same for inexact units.
        inexact_reasons: The reasons.
        votes: (labels,) whether a voting layer produces the unit.
        expanded: (labels,) number of the layer that is expanded for this unit, -1 for none.
    """

    def __init__(self, record: Record, expansions: Expansions, exact_only: bool, more_inexact: Reasons) -> None:
        constraints = record.constraints
        self.root = root = connected_labels(constraints, expansions.boundaries)

        # Reasons why labels are frozen or inexact.
        frozen = [(np.array([FIXED]), "padded with constants"), *constraints.frozen]
        expanded = expansions.boundaries
        frozen += [(b.outer, expanded[b.key]) for b in constraints.boundaries if b.key in expanded]
        whole = [(record.layers[name].outputs, reason) for name, reason in expansions.whole.items()]
        frozen += [(labels, reason) for labels, reason in whole if labels is not None]
        inexact = [*constraints.inexact, *more_inexact]
        if exact_only:
            frozen += [(labels, f"{reason} (exact_only)") for labels, reason in inexact]
        self.frozen_reason, self.frozen_reasons = self._first_reasons(frozen)
        self.inexact_reason, self.inexact_reasons = self._first_reasons(inexact)

        # Units with a voting layer, and the expanded layer of each unit (-1: none).
        self.votes = np.zeros(constraints.num_labels, dtype=bool)
        self.expanded = np.full(constraints.num_labels, -1)
        for number, facts in enumerate(record.layers.values()):
            if facts.outputs is not None and votes(facts, expansions):
                self.votes[root[facts.outputs]] = True
                if facts.name in expansions.layers:
                    self.expanded[root[facts.outputs]] = number

    def _first_reasons(self, entries: Reasons) -> tuple[np.ndarray, list[str]]:
        """Return the number of the first reason given for any label of a unit, by root, and the reasons."""
        reasons = list(dict.fromkeys(reason for _, reason in entries))
        number = {reason: i for i, reason in enumerate(reasons)}
        first = np.full(len(self.root), -1)
        if entries:
            labels = np.concatenate([labels for labels, _ in entries])
            numbers = np.repeat([number[reason] for _, reason in entries], [len(labels) for labels, _ in entries])
            first[self.root[labels[::-1]]] = numbers[::-1]  # the last write remains: the first entry
        return first, reasons

    def number_of_frozen_reason(self, reason: str) -> int:
        """Return the position of a reason in `frozen_reasons`, where it is added if it is missing."""
        if reason not in self.frozen_reasons:
            self.frozen_reasons.append(reason)
        return self.frozen_reasons.index(reason)


def freeze_shared_expansions(
    record: Record, expansions: Expansions, unit_facts: UnitFacts, source_of: np.ndarray, is_owned: np.ndarray
) -> None:
    """Freeze expanded units that hold positions of tensors of other layers.

    A filter that is expanded may belong to its layer and the norm behind it only: what else uses the weight directly
    would see another width.

    Args:
        record: The record.
        expansions: The layers to expand.
        unit_facts: Facts about the units; the frozen reasons are changed.
        source_of: (labels,) number of the source of every label.
        is_owned: (sources,) whether a source is a tensor or an attribute.
    """
    if not expansions.layers:
        return
    # Pairs of an expanded layer and a source (a tensor or an attribute) that one of its units has labels in.
    constraints, root = record.constraints, unit_facts.root
    layers = list(record.layers.values())
    gathering = {b.key.module for b in constraints.boundaries if b.key.is_input}
    expanded_layer = unit_facts.expanded[root]
    candidates = np.flatnonzero((expanded_layer >= 0) & is_owned[source_of])
    pairs = expanded_layer[candidates] * len(constraints.sources) + source_of[candidates]
    # Freeze the units of each pair whose source is neither the layer's own nor the norm's.
    for pair in np.unique(pairs).tolist():
        facts = layers[pair // len(constraints.sources)]
        source = constraints.sources[pair % len(constraints.sources)]
        if isinstance(source, SizeAttribute):
            is_own = source.module in (facts.name, facts.module)
        else:
            assert isinstance(source, TensorDim)
            is_own = source.tensor == facts.weight or source.tensor.startswith(
                (f"{facts.name}.", f"{facts.module}.", f"{expansions.layers[facts.name]}.")
            )
        if not is_own:
            is_unreached = expansions.gathers(facts.name) and facts.name not in gathering
            number = unit_facts.number_of_frozen_reason(_BY_KEYWORD if is_unreached else _USED_ELSEWHERE)
            unit_facts.frozen_reason[root[candidates[pairs == pair]]] = number


def votes(facts: LayerFacts, expansions: Expansions) -> bool:
    """Return whether a layer votes: a depthwise convolution does only if it gathers its own channels."""
    return facts.votes or expansions.gathers(facts.name)

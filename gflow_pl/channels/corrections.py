"""What a failed verification tells the next recording to do differently."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from gflow_pl.channels.labels import ChoiceSite

__all__ = ["Correction", "Corrections", "OperatorIndex"]


class OperatorIndex(NamedTuple):
    """The position of an operator in a recorded forward pass.

    Attributes:
        training: Whether the pass was in training mode.
        number: Number of the operator in that pass.
    """

    training: bool
    number: int


@dataclass(frozen=True)
class Correction:
    """One change to the next recording: another choice at a site, or labels that are frozen.

    Attributes:
        reason: Why the labels are frozen.
        site: Site whose next choice is made, or None.
        operator: Operator whose labels are frozen if there is no site.
        freezes_rest: Whether the labels of all later operators of that pass are frozen, too, because their sizes depend
            on values.
    """

    reason: str
    site: ChoiceSite | None = None
    operator: OperatorIndex | None = None
    freezes_rest: bool = False


@dataclass(eq=False)
class Corrections:
    """All corrections that the verifications of a trace have asked for so far.

    Attributes:
        choices: Site to the number of the choice to make there.
        frozen_operators: Operator to the reason why its labels are frozen, together with the labels of all operators
            that are called from the same place in the code.
        ends: For every mode (True = training), the number of the first operator from which on all labels are frozen,
            and the reason.
    """

    choices: dict[ChoiceSite, int] = field(default_factory=dict)
    frozen_operators: dict[OperatorIndex, str] = field(default_factory=dict)
    ends: dict[bool, tuple[int, str]] = field(default_factory=dict)

    def add(self, correction: Correction) -> None:
        """Add one correction."""
        if correction.site is not None:
            self.choices[correction.site] = self.choices.get(correction.site, 0) + 1
        elif correction.operator is not None and correction.freezes_rest:
            self.ends[correction.operator.training] = correction.operator.number, correction.reason
        elif correction.operator is not None:
            self.frozen_operators[correction.operator] = correction.reason

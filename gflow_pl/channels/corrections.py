"""What a failed verification tells the next recording to do differently."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from gflow_pl.channels.checked_sizes import CheckedSizes
from gflow_pl.channels.constraints import Labels, TensorDim
from gflow_pl.channels.labels import ChoiceSite
from gflow_pl.values import SizeAttribute

__all__ = ["Correction", "Corrections", "OperatorIndex"]


_MAX_TRIES = 12


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
    """One change to the next recording: another choice at a site, numbers that count channels, or frozen labels.

    Attributes:
        reason: Why the labels are frozen.
        failed: The operator at which the verification failed.
        site: Site whose next choice is made, or None.
        sizes: Numbers of a class of modules that count channels of what its modules read, or None.
        operator: Operator whose labels are frozen if there is no site.
        positions: Positions of tensors whose labels are frozen if there is neither.
        freezes_rest: Whether the labels of all later operators of that pass are frozen, too, because their sizes depend
            on values.
    """

    reason: str
    failed: OperatorIndex
    site: ChoiceSite | None = None
    sizes: CheckedSizes | None = None
    operator: OperatorIndex | None = None
    positions: tuple[tuple[TensorDim, Labels], ...] = ()
    freezes_rest: bool = False


@dataclass(eq=False)
class Corrections:
    """All corrections that the verifications of a trace have asked for so far.

    Attributes:
        choices: Site to the number of the choice to make there.
        checked_sizes: Class of modules to the names of their numbers that count channels, see `CheckedSizes`.
        frozen_operators: Operator to the reason why its labels are frozen, together with the labels of all operators
            that are called from the same place in the code.
        frozen_positions: Positions of tensors that are frozen, each with the reason.
        ends: For every mode (True = training), the number of the first operator from which on all labels are frozen,
            and the reason.
        unneeded: Numbers of modules that count labels, but keep their values, as no forward needs the change.
        is_choosing: Whether further choices may be tried; if not, what differs is frozen.
        num_neighbors: Number of groups that are frozen together with a group that makes a difference, so that a
            verification comes to an end.
    """

    choices: dict[ChoiceSite, int] = field(default_factory=dict)
    checked_sizes: dict[type[nn.Module], tuple[str, ...]] = field(default_factory=dict)
    frozen_operators: dict[OperatorIndex, str] = field(default_factory=dict)
    frozen_positions: list[tuple[TensorDim, Labels, str]] = field(default_factory=list)
    ends: dict[bool, tuple[int, str]] = field(default_factory=dict)
    unneeded: set[SizeAttribute] = field(default_factory=set)
    is_choosing: bool = True
    num_neighbors: int = 0
    _tried: dict[OperatorIndex, dict[ChoiceSite, int]] = field(default_factory=dict)
    _sizes_tried: dict[CheckedSizes, OperatorIndex] = field(default_factory=dict)
    _in_vain: set[OperatorIndex] = field(default_factory=set)

    def with_choice(self, site: ChoiceSite, step: int) -> Corrections:
        """Return the choices of these corrections alone, with a later one at a site.

        Args:
            site: The site.
            step: Number of choices to go on.
        """
        choices = {**self.choices, site: self.choices.get(site, 0) + step}
        return Corrections(choices=choices, checked_sizes=dict(self.checked_sizes))

    def allows_choices(self, failed: OperatorIndex) -> bool:
        """Return whether choices may still cure the failure of an operator: not if many have been tried in vain."""
        num_tried = sum(self.choices[site] - before for site, before in self._tried.get(failed, {}).items())
        return self.is_choosing and failed not in self._in_vain and num_tried < _MAX_TRIES

    def allows_sizes(self, sizes: CheckedSizes) -> bool:
        """Return whether these numbers of a class of modules may be tried: once."""
        return self.is_choosing and sizes not in self._sizes_tried

    def add(self, correction: Correction) -> None:
        """Add one correction. What did not cure a failure is taken back once labels are frozen for it."""
        failed, site = correction.failed, correction.site
        if site is not None:
            self._tried.setdefault(failed, {}).setdefault(site, self.choices.get(site, 0))
            self.choices[site] = self.choices.get(site, 0) + 1
            return

        if correction.sizes is not None:
            self.checked_sizes[correction.sizes.kind] = correction.sizes.names
            self._sizes_tried[correction.sizes] = failed
            return

        self.choices.update(self._tried.pop(failed, {}))
        for sizes in [sizes for sizes, tried_for in self._sizes_tried.items() if tried_for == failed]:
            self.checked_sizes.pop(sizes.kind, None)
        self._in_vain.add(failed)
        if correction.operator is None:
            self.frozen_positions += [(dim, positions, correction.reason) for dim, positions in correction.positions]
        elif correction.freezes_rest:
            self.ends[correction.operator.training] = correction.operator.number, correction.reason
        else:
            self.frozen_operators[correction.operator] = correction.reason

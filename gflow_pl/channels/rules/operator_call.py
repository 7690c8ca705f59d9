"""What a rule receives: one call of an operator, the labels of its tensors, and the ways to constrain them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from gflow_pl.channels.code_location import code_location
from gflow_pl.channels.constraints import Auxiliary, Labels
from gflow_pl.channels.label_table import LabelTable
from gflow_pl.channels.labels import ChoiceSite, TensorInfo
from gflow_pl.values import SizeAttribute

__all__ = ["OperatorCall", "Rule"]

_LIKELY_NAMES = ("head", "width", "dim", "chan", "split", "group", "feat", "size", "plane")


@dataclass(eq=False)
class OperatorCall:
    """One call of an operator during a trace.

    A trace runs the network once in training mode and once in evaluation mode. After every call of an operator it calls
    the operator's rule with an `OperatorCall`. The rule reads the labels of the operands (`info`), sets the labels of
    every output (`set_labels`), and states which labels must be pruned together (`join`, `match`), must stay
    (`freeze`), or are inexact (`mark_inexact`).

    A label is a whole number that stands for one channel of the network. Each dimension of a tensor has either a vector
    with one label for each position along it, or None if pruning cannot change its size. Positions with the same label,
    in whatever tensor, belong to the same channel and are removed together.

    The tensors may be on the meta device. A rule may therefore read shapes and dtypes, but no values.

    Attributes:
        name: Name of the operator: ``"namespace::name"``, and ``"name"`` for torch's own operators.
        args: Positional arguments.
        kwargs: Keyword arguments.
        operands: All tensors among the arguments, in order, those in lists included.
        output: What the operator returned: a tensor, a tuple or list of tensors, or something else.
        module: The innermost module whose forward is running; None outside of modules.
        module_name: Its name.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: Sequence[Tensor]
    output: Any
    module: nn.Module | None = None
    module_name: str = ""
    module_input: Tensor | None = None
    is_activation: bool = False
    table: LabelTable = field(kw_only=True)
    choices: Mapping[ChoiceSite, int] = field(kw_only=True)
    sites: list[tuple[ChoiceSite, int]] = field(default_factory=list)
    expected: list[tuple[int, Labels]] = field(default_factory=list)
    is_guess: bool = False

    # -- operands and outputs ----------------------------------------------------------------------------------------

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that may be given by position or by name.

        Args:
            position: Its position in the operator's schema.
            name: Its name in the schema.
            default: Value if the argument was not given.
        """
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    @property
    def outputs(self) -> list[Tensor]:
        """The output tensors in order."""
        parts = self.output if isinstance(self.output, (tuple, list)) else [self.output]
        return [part for part in parts if isinstance(part, Tensor)]

    def info(self, tensor: Tensor) -> TensorInfo:
        """Return what is known of an operand: its ``labels``, its ``zero_dims``, and whether it ``is_uniform``."""
        return self.table.info(tensor)

    def set_labels(
        self, output: Tensor, labels: Sequence[Labels | None], zero_dims: Iterable[int] = (), is_uniform: bool = False
    ) -> None:
        """Set the labels of an output.

        Args:
            output: One of the outputs.
            labels: For every dimension of the output, the labels of its positions, or None.
            zero_dims: Dimensions along which the elements of a channel are zero in the masked network, in which the
                channel's filter outputs zeros. For ``y = f(x)`` with ``f(0) = 0`` these are the `zero_dims` of ``x``.
                If a dimension is missing here, later sums over it are reported as inexact.
            is_uniform: Whether all elements have the same value.
        """
        self.table.set_labels(output, labels, zero_dims, is_activation=self.is_activation, is_uniform=is_uniform)

    # -- constraints ---------------------------------------------------------------------------------------------------

    def join(self, a: Labels, b: Labels) -> None:
        """Require that label i of `a` and label i of `b` are pruned together, for every i."""
        self.table.constraints.join(a, b)

    def join_rows(self, table: np.ndarray) -> None:
        """Require that all labels in a row are pruned together, for every row of a (units, width) table."""
        self.table.constraints.join_rows(table)

    def match(self, a: Labels | None, b: Labels | None, reason: str) -> None:
        """Join two vectors, or freeze the one that is there if the other is None.

        Args:
            a: Labels of a dimension, or None if its size cannot change.
            b: The same for a dimension that must have the same size.
            reason: Reason to report if one of them is None.
        """
        if a is not None and b is not None:
            self.join(a, b)
        else:
            self.freeze(a, reason)
            self.freeze(b, reason)

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """Require that these labels are never removed; do nothing for None.

        Args:
            labels: Labels of a dimension.
            reason: Reason to report for the layers that produce them, a noun phrase or a short sentence.
        """
        self.table.constraints.freeze(labels, reason)

    def mark_inexact(self, labels: Labels | None, reason: str) -> None:
        """Note that the removal of these labels changes what other channels compute; do nothing for None.

        Args:
            labels: Labels of a dimension.
            reason: Reason to report, see `ChannelGroup.inexact`.
        """
        self.table.constraints.mark_inexact(labels, reason)

    def sum_labels(self, size: int) -> Labels:
        """Return new labels for a sum of two activations, which belongs to neither of them alone."""
        return self.table.constraints.new_labels(Auxiliary.SUM, size)

    def broadcast_labels(self, size: int) -> Labels | None:
        """Return new labels for a dimension that is broadcast to a size; None for a single position."""
        return self.table.constraints.new_labels(Auxiliary.BROADCAST, size) if size > 1 else None

    def is_broadcast(self, labels: Labels | None) -> bool:
        """Return whether labels are those of a dimension that was broadcast, and met no other channels yet."""
        return labels is not None and self.table.constraints.is_broadcast(labels)

    def add_activations(self, a: Labels, b: Labels) -> None:
        """Join the labels of two added activations: a residual stream, unless something else joins them too."""
        self.table.constraints.adds.append((a, b))

    # -- sizes that the code gives as numbers -----------------------------------------------------------------------

    def choose(self, num: int, priority: int = -1, *, is_certain: bool = False, shared_key: Hashable = None) -> int:
        """Return which of several interpretations to use at this place in the code.

        The first one is used until the verification of the trace fails at this place, then the next one.

        Args:
            num: Number of interpretations.
            priority: Tells apart several choices of one operator. The verification changes the one with the lowest
                number first.
            is_certain: Whether the first interpretation supposes nothing that has to be verified more thoroughly.
            shared_key: If given, operators of the same function with an equal key use the same interpretation (the
                views of queries, keys and values).

        Returns:
            A number in 0..num - 1.
        """
        site = ChoiceSite(priority, shared_key, code_location(innermost_line=shared_key is None))
        choice = min(self.choices.get(site, 0), num - 1)
        self.sites.append((site, num - 1 - choice))
        self.is_guess |= choice > 0 or not is_certain
        return choice

    def expect_argument(self, position: int, labels: Labels) -> None:
        """State that an argument is the number of those of these labels that remain after pruning.

        Args:
            position: Position of the argument.
            labels: Labels to count.
        """
        self.expected.append((position, labels))

    def size_attributes(self, size: int) -> list[SizeAttribute]:
        """Return the attributes of the running module that are whole numbers of this value.

        Returns:
            The attributes, those first whose names are likely to count channels. None for sizes 0 and 1.
        """
        if size <= 1:
            return []
        found = [name for name, value in self._attributes() if type(value) is int and value == size]
        found.sort(key=lambda key: next((i for i, word in enumerate(_LIKELY_NAMES) if word in key), len(_LIKELY_NAMES)))
        return [SizeAttribute(self.module_name, key) for key in found]

    def sequence_attributes(self) -> list[tuple[str, Sequence[object]]]:
        """Return the name and the value of every attribute of the running module that is a list or a tuple."""
        return [(name, value) for name, value in self._attributes() if isinstance(value, (list, tuple))]

    def _attributes(self) -> list[tuple[str, object]]:
        """Return name and value of the running module's attributes. Names like ``a[0]`` would be read as elements."""
        own = {} if self.module is None else vars(self.module)
        return [(name, value) for name, value in own.items() if name.isidentifier()]

    def input_channels(self, size: int) -> Labels | None:
        """Return the last labels of this number among the dimensions of the running module's input, None for none."""
        if self.module_input is None:
            return None
        vectors = reversed(self.info(self.module_input).labels)
        return next((labels for labels in vectors if labels is not None and len(labels) == size), None)

    def note_count(self, attribute: SizeAttribute, labels: Labels) -> None:
        """State that an attribute of a module is the number of those of these labels that remain after pruning."""
        own = self.table.constraints.labels_of(attribute, len(labels))
        if len(own) == len(labels):
            self.join(own, labels)
        else:
            reason = f"attribute '{attribute.name}' of '{attribute.module}' counts two different things"
            self.freeze(labels, reason)

    def note_own_count(self, name: str, labels: Labels) -> None:
        """Do `note_count` for an attribute of the running module, if it is the number of these labels now."""
        if self.module is not None and vars(self.module).get(name) == len(labels):
            self.note_count(SizeAttribute(self.module_name, name), labels)


Rule = Callable[[OperatorCall], None]
"""A function that sets the labels of an operator's outputs and states constraints between labels."""

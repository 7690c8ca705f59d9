"""The data flow of a forward pass: which earlier result, parameter, input or constant every operand is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["LAYOUT_DEPENDENT", "MAX_VALUES", "Constants", "DataFlow", "Sources"]

LAYOUT_DEPENDENT = frozenset(["clone", "contiguous", "detach", "alias", "_to_copy", "as_strided_"])
"""Operators that appear and disappear with the memory layout of their operands: the data flow looks through them."""

Sources = tuple[int, ...]
"""For every operand of an operator, the number of its source."""

Constants = dict[int, tuple[Tensor, int]]
"""id of a constant to the constant, which keeps the id unique, and its number."""

MAX_VALUES = 1024
"""The values of constants with at most this many elements are recorded as the numbers of their operators."""

_FIRST_CONSTANT = 1 << 40
_UNKNOWN_CONSTANT = 1 << 41
_WRITES_TO_COPY = 0


class DataFlow:
    """Numbers the tensors of one forward pass by where they come from.

    Parameters, buffers and inputs have negative numbers. Results of operators are numbered from 1 in the order of the
    forward, and constants from 2**40 in the order of their first use. Constants that exist longer than one pass keep
    the number of the pass that was recorded. Two passes of a forward that call the same operators in the same order on
    tensors with the same numbers compute the same function, in-place writes and views included.

    Args:
        tensors: The parameters, the buffers and the inputs, in an order that is the same for all passes.
        constants: id of a constant to the constant and its number, for all passes.
        is_recorded: Whether the constants of this pass are added to `constants`.
    """

    def __init__(self, tensors: Iterable[Tensor], constants: Constants, *, is_recorded: bool) -> None:
        self._constants, self._is_recorded = constants, is_recorded
        self._numbers: dict[int, int] = {}  # by the id of a tensor
        for position, tensor in enumerate(tensors):
            self._numbers.setdefault(id(tensor), -1 - position)
        self._next_result, self._next_constant = 1, _FIRST_CONSTANT
        self._copies: set[int] = set()  # ids of results of layout-dependent operators
        self._originals: dict[int, Tensor] = {}  # id of the copy of a constant that has no number yet to the constant
        self._alive: list[Tensor] = []  # ids stay unique only while the tensors live

    def sources(self, operands: Iterable[Tensor], *, is_write: bool = False) -> Sources:
        """Return the number of the source of every operand.

        Args:
            operands: The tensors that an operator is called with.
            is_write: Whether the operator writes into the first one. Whether that is a copy is then a part of the
                answer.
        """
        operands = list(operands)
        numbers = self._numbers
        found = tuple([numbers.get(id(x)) or self._number_of_constant(x) for x in operands])
        return (*found, _WRITES_TO_COPY) if is_write and operands and id(operands[0]) in self._copies else found

    def add_results(self, results: Iterable[Tensor], operands: Sequence[Tensor]) -> None:
        """Number the results of an operator; an operand that is returned keeps its number."""
        for result in results:
            for operand in operands:
                if operand is result:
                    break
            else:
                self._numbers[id(result)] = self._next_result
                self._next_result += 1

    def add_copy(self, copy: Tensor, original: Tensor) -> None:
        """Number the result of a layout-dependent operator as its operand."""
        if copy is not original:
            self.add_stand_in(copy, original)
            self._copies.add(id(copy))

    def add_stand_in(self, copy: Tensor, original: Tensor) -> None:
        """Give a tensor that replaces another one in this pass the number of that one."""
        number = self._numbers.get(id(original))
        if number is None:
            self._originals[id(copy)] = self._originals.get(id(original), original)
            self._numbers.pop(id(copy), None)
            self._alive.append(original)
        else:
            self._numbers[id(copy)] = number
        self._alive.append(copy)
        self._copies.discard(id(copy))

    def _is_another(self, constant: Tensor) -> bool:
        """Return whether a constant differs from the recorded one with the next number. Small ones count as equal.

        The values of small constants are compared as numbers.
        """
        recorded = next((x for x, number in self._constants.values() if number == self._next_constant), constant)
        if recorded is constant or constant.numel() <= MAX_VALUES or constant.is_meta or recorded.is_meta:
            return False
        with _disable_current_modes():
            return recorded.dtype != constant.dtype or not torch.equal(recorded, constant)

    def _number_of_constant(self, tensor: Tensor) -> int:
        """Return the number of a tensor that no operator returned, which is made at the first call."""
        original = self._originals.get(id(tensor), tensor)
        number = self._numbers.get(id(original))
        if number is None:
            known = self._constants.get(id(original))
            number = self._next_constant if known is None else known[1]
            if known is None and not self._is_recorded and self._is_another(original):
                number = _UNKNOWN_CONSTANT
            self._next_constant += 1
            self._alive.append(original)
            if self._is_recorded:
                self._constants[id(original)] = original, number
        self._numbers[id(tensor)] = self._numbers[id(original)] = number
        return number

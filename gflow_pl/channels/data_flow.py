"""The data flow of a forward pass: which earlier result, parameter, input or constant every operand is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

__all__ = ["LAYOUT_DEPENDENT", "DataFlow", "Sources"]

LAYOUT_DEPENDENT = frozenset(["clone", "contiguous", "detach", "alias", "_to_copy", "as_strided_"])
"""Operators that appear and disappear with the memory layout of their operands: the data flow looks through them."""

Sources = tuple[int, ...]
"""For every operand of an operator, the number of its source."""

_FIRST_CONSTANT = 1 << 40
_WRITES_TO_COPY = 0


class DataFlow:
    """Numbers the tensors of one forward pass by where they come from.

    Parameters, buffers and inputs have negative numbers. Results of operators are numbered from 1 in the order of the
    forward, and constants from 2**40 in the order of their first use. Two passes of a forward that call the same
    operators in the same order on tensors with the same numbers compute the same function, in-place writes and views
    included.

    Args:
        tensors: The parameters, the buffers and the inputs, in an order that is the same for all passes.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
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

    def _number_of_constant(self, tensor: Tensor) -> int:
        """Return the number of a tensor that no operator returned, which is made at the first call."""
        original = self._originals.get(id(tensor), tensor)
        number = self._numbers.get(id(original))
        if number is None:
            number = self._next_constant
            self._next_constant += 1
            self._alive.append(original)
        self._numbers[id(tensor)] = self._numbers[id(original)] = number
        return number

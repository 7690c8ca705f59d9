"""Whole numbers of a module that its code compares with the width of a tensor: ``assert x.shape[1] == self.width``."""

from __future__ import annotations

import dis
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple

from torch import Tensor, nn

from gflow_pl.channels.constraints import Constraints
from gflow_pl.channels.label_table import LabelTable
from gflow_pl.values import SizeAttribute

__all__ = ["CheckedSizes", "count_checked_sizes", "sizes_checked_before"]


class CheckedSizes(NamedTuple):
    """Attributes that the code of a class reads where it raised an error.

    Attributes:
        kind: The class.
        names: Names of the attributes.
    """

    kind: type[nn.Module]
    names: tuple[str, ...]


def sizes_checked_before(error: Exception) -> list[CheckedSizes]:
    """Return the whole numbers that the innermost module that raised an error reads, likely ones first.

    These are the numbers that are read in the line of the error, in the line before it (the condition of a ``raise``),
    and in the whole function.

    Args:
        error: An error of a forward, raised by code of a module between two operators.

    Returns:
        The numbers; none if a module of torch raised the error.
    """
    found: tuple[nn.Module, TracebackType] | None = None
    step = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        module = step.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None  # usually `self`
        if isinstance(module, nn.Module) and "_call_impl" not in code.co_name:
            found = module, step
        step = step.tb_next
    if found is None or type(found[0]).__module__.startswith("torch.nn."):
        return []
    module, step = found

    # Whole numbers that are read, by line.
    by_line: dict[int, list[str]] = {}
    for instruction in dis.get_instructions(step.tb_frame.f_code):
        name = str(instruction.argval)
        if instruction.opname == "LOAD_ATTR" and type(vars(module).get(name)) is int and vars(module)[name] > 1:
            by_line.setdefault(_line_of(instruction) or 0, []).append(name)
    lines = sorted((line for line in by_line if line <= step.tb_lineno), reverse=True)[:2]
    candidates = [by_line[line] for line in lines] + [[name for names in by_line.values() for name in names]]
    return [CheckedSizes(type(module), tuple(dict.fromkeys(names))) for names in candidates if names]


def _line_of(step: dis.Instruction) -> int | None:
    return None if step.positions is None else step.positions.lineno


def count_checked_sizes(
    name: str, module: nn.Module, names: Iterable[str], tensor: Tensor, table: LabelTable, constraints: Constraints
) -> None:
    """Let numbers of a module count the channels of a tensor that it reads, if it has as many.

    Args:
        name: Name of the module.
        module: The module.
        names: Names of the numbers.
        tensor: A tensor that is passed to the module or returned by one of its children.
        table: The labels of all tensors.
        constraints: Where the constraint is added. A number that counts channels already is left out.
    """
    for labels in table.info(tensor).labels:
        for attribute in (SizeAttribute(name, attribute) for attribute in names):
            is_size = labels is not None and vars(module).get(attribute.name) == len(labels)
            if labels is not None and is_size and not constraints.has(attribute):
                constraints.join(constraints.labels_of(attribute, len(labels)), labels)

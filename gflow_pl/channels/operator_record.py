"""The record of one operator's call in a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from gflow_pl.channels.code_location import CodeLocation
from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.data_flow import Sources
from gflow_pl.channels.labels import ChoiceSite, DimLabels

__all__ = ["Number", "OperatorRecord"]

Number = int | float | complex | str | torch.dtype
"""A plain number among the arguments of an operator, bools included; or a string or a dtype."""


@dataclass(eq=False)
class OperatorRecord:
    """The record of one operator's call. The verification compares a forward pass at smaller shapes with it.

    Attributes:
        name: Name of the operator.
        numbers: All plain numbers, strings and dtypes among its arguments.
        sources: Where its operands come from.
        shapes: Shapes of its outputs.
        output_labels: For every output, the labels of its dimensions; None for a uniform output, which can have any
            size.
        all_labels: All label vectors of its operands and outputs.
        module: Name of the module whose forward called it.
        site: Where a rule made a choice and has alternatives left, or None.
        choices_left: Number of alternatives left at that site.
        expected_counts: (argument position, labels): this argument has to equal the number of these labels that are
            kept.
        location: Where in the user's code it was called; None if locations were not recorded.
        operand_shapes: Shapes of its operands if the values of its outputs follow from these sizes alone (a sum of
            ones), else None.
        is_data_dependent: Whether the sizes of its outputs may depend on the values of its operands.
        output: Its output, kept if the verification is to continue with it instead of calling the operator.
    """

    name: str
    numbers: tuple[Number, ...]
    sources: Sources
    shapes: list[torch.Size]
    output_labels: list[DimLabels | None]
    all_labels: list[Labels]
    module: str
    site: ChoiceSite | None = None
    choices_left: int = 0
    expected_counts: list[tuple[int, Labels]] = field(default_factory=list)
    location: CodeLocation | None = None
    operand_shapes: list[torch.Size] | None = None
    is_data_dependent: bool = False
    output: Any = None

"""What the tracer knows of tensors: the labels of their positions."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from gflow_pl.channels.code_location import CodeLocation
from gflow_pl.channels.constraints import Labels

__all__ = ["ChoiceSite", "DimLabels", "TensorInfo"]

DimLabels = list[Labels | None]
"""For every dimension of a tensor, the labels of its positions; None if the size of the dimension cannot change."""


@dataclass(eq=False)
class TensorInfo:
    """What the recorder knows of one tensor.

    Attributes:
        labels: For every dimension, the labels of its positions.
        zero_dims: Dimensions along which the slice of a removed unit is zero in the masked network.
        is_activation: Whether the tensor depends on the input of the network.
        is_uniform: Whether all elements are one number, so that the tensor can take any size (`torch.zeros`, for
            example).
    """

    labels: DimLabels
    zero_dims: frozenset[int] = frozenset()
    is_activation: bool = False
    is_uniform: bool = False


class ChoiceSite(NamedTuple):
    """A place in the user's code where the labels can be interpreted in several ways, of which a rule chose one.

    Attributes:
        priority: Of several choices that one operator needs, the one with the lowest priority is changed first.
        shared_key: Operators of one function with the same key make the same choice; None to choose for every line.
        location: The place in the code.
    """

    priority: int
    shared_key: Hashable
    location: CodeLocation

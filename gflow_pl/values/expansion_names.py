"""Names under which a module stores its expansion or gather: a buffer with positions and two numbers.

Surgery writes them; a trace reads them, and leaves the buffers out of the tensors that channels belong to.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EXPANSION", "GATHER", "PLAIN_CLASS", "PlacementNames", "is_index_buffer", "plain_class"]

PLAIN_CLASS = "_gflow_plain_class"
"""Attribute of the class of an expanded layer: the class of torch that it derives from."""


def plain_class(module: object) -> type:
    """Return the class of a module; for an expanded layer of torch, the class that it had before."""
    found: type = getattr(type(module), PLAIN_CLASS, type(module))
    return found


class PlacementNames(NamedTuple):
    """Attributes of a module that describe where channels are placed.

    Attributes:
        positions: Non-persistent buffer, (channels,) int64: position of each channel at the full width.
        dim: Channel dimension, an int.
        width: Full width, an int.
        kept: The positions as a tuple of ints, which outlives the buffer; old files lack it.
    """

    positions: str
    dim: str
    width: str
    kept: str


EXPANSION = PlacementNames("_gflow_index", "_gflow_dim", "_gflow_width", "_gflow_kept")
"""Scatter of a module's output into zeros of the full width."""

GATHER = PlacementNames("_input_gflow_index", "_input_gflow_dim", "_input_gflow_width", "_input_gflow_kept")
"""Selection of the channels that a grouped convolution reads from an input of the full width."""


def is_index_buffer(name: str) -> bool:
    """Return whether a buffer, given by its local or its full name, holds positions of an expansion or a gather."""
    return name.endswith((EXPANSION.positions, GATHER.positions))

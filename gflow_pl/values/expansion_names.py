"""Names under which a module stores its expansion or gather: a buffer with positions and two numbers.

Surgery writes them; a trace reads them, and leaves the buffers out of the tensors that channels belong to.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EXPANSION", "GATHER", "PlacementNames", "is_index_buffer"]


class PlacementNames(NamedTuple):
    """Attributes of a module that describe where channels are placed.

    Attributes:
        positions: Non-persistent buffer, (channels,) int64: position of each channel at the full width.
        dim: Channel dimension, an int.
        width: Full width, an int.
    """

    positions: str
    dim: str
    width: str


EXPANSION = PlacementNames("_gflow_index", "_gflow_dim", "_gflow_width")
"""Scatter of a module's output into zeros of the full width."""

GATHER = PlacementNames("_input_gflow_index", "_input_gflow_dim", "_input_gflow_width")
"""Selection of the channels that a grouped convolution reads from an input of the full width."""


def is_index_buffer(name: str) -> bool:
    """Return whether a buffer, given by its local or its full name, holds positions of an expansion or a gather."""
    return name.endswith((EXPANSION.positions, GATHER.positions))

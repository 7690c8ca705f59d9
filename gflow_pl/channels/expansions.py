"""The layers that are expanded: their filters are removed, and everything that reads them keeps its width."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gflow_pl.channels.constraints import BoundaryKey, Constraints, Labels
from gflow_pl.channels.record import Record

__all__ = ["STREAM", "Expansions", "add_residual_expansions", "connected_labels", "present_expansions"]

STREAM = "the residual stream keeps its width"
PRESENT = "an expansion keeps its width"


@dataclass(eq=False)
class Expansions:
    """The layers to expand, and the boundaries at which this separates inner from outer labels.

    Attributes:
        boundaries: Boundary to the reason why the labels on its outer side stay.
        layers: Layer to the module whose output is scattered for it: the layer, or the norm that alone reads it.
        whole: Layer that cannot be expanded and therefore stays, to the reason.
    """

    boundaries: dict[BoundaryKey, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    def add(self, record: Record, layer: str, reason: str) -> None:
        """Expand a layer: scatter its output, or the output of the norm that alone reads it."""
        module = record.expands_at_norm.get(layer) or record.layers[layer].module or layer
        self.layers[layer] = module
        self.boundaries.setdefault(BoundaryKey(module), reason)

    def add_gather(self, layer: str, reason: str) -> None:
        """Let a grouped convolution gather some channels of its input, which keeps its width."""
        self.boundaries.setdefault(BoundaryKey(layer, is_input=True), reason)

    @property
    def has_gathers(self) -> bool:
        """Whether any layer gathers some channels of its input."""
        return any(key.is_input for key in self.boundaries)

    def gathers(self, layer: str) -> bool:
        """Return whether a layer gathers some channels of its input."""
        return BoundaryKey(layer, is_input=True) in self.boundaries


def connected_labels(
    constraints: Constraints, expanded: dict[BoundaryKey, str], *, include_adds: bool = True
) -> Labels:
    """Return the root of every label: labels that must be pruned together have the same root.

    Args:
        constraints: The constraints.
        expanded: The boundaries whose inner and outer labels are not joined.
        include_adds: Whether additions of activations join labels.

    Returns:
        (labels,) roots, each the smallest label of its component.
    """
    edges = [*constraints.edges, *(constraints.adds if include_adds else [])]
    edges += [(b.inner, b.outer) for b in constraints.boundaries if b.key not in expanded]
    return constraints.components(edges)


def present_expansions(record: Record) -> Expansions:
    """Return the expansions that the model has already; they stay."""
    expansions = Expansions()
    for layer, facts in record.layers.items():
        norm = record.expands_at_norm.get(layer)
        if norm in record.expanded or facts.module in record.expanded:
            expansions.add(record, layer, PRESENT)
            if norm not in record.expanded:
                expansions.layers[layer] = facts.module or layer
    scattered = [BoundaryKey(module) for module in record.expanded]
    gathered = [BoundaryKey(layer, is_input=True) for layer in record.gathering]
    expansions.boundaries = dict.fromkeys([*scattered, *gathered], PRESENT)
    return expansions


def add_residual_expansions(record: Record, expansions: Expansions) -> None:
    """Expand every layer that writes into a residual stream: into channels that an addition of activations couples."""
    constraints = record.constraints
    whole = connected_labels(constraints, expansions.boundaries)
    apart = connected_labels(constraints, expansions.boundaries, include_adds=False)

    # A stream is a component that only additions hold together, and that is not the model's output.
    streams = np.zeros(constraints.num_labels, dtype=bool)
    for a, b in constraints.adds:
        streams[whole[a[apart[a] != apart[b]]]] = True
    for labels in record.outputs:
        streams[whole[labels]] = False

    for layer, facts in record.layers.items():
        if not facts.votes or facts.outputs is None or layer in expansions.layers:
            continue
        if not streams[whole[facts.outputs]].any():
            continue
        if facts.module is None:  # no module returns its output, so that nothing can scatter it
            expansions.whole[layer] = STREAM
        else:
            expansions.add(record, layer, STREAM)

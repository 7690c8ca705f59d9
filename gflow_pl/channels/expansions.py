"""Where an expansion dissolves what would have to shrink together."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gflow_pl.channels.constraints import Book, Nodes, input_of
from gflow_pl.channels.record import Survey

__all__ = ["STREAM", "Cuts", "connected", "present_cuts", "residual_cuts"]

STREAM = "the residual stream keeps its width"
PRESENT = "an expansion keeps its width"


@dataclass(eq=False)
class Cuts:
    """The layers that are expanded, and where.

    Attributes:
        modules: Module whose output is scattered (or `input_of` one whose input is gathered), to the reason why everything
            on the other side stays as it is.
        layers: Layer to the module whose output is scattered for it.
    """

    modules: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)

    def add(self, found: Survey, layer: str, why: str) -> None:
        """Cuts behind the layer, or behind the norm that alone reads it."""
        module = found.cuts_at_norm.get(layer) or layer
        self.layers[layer] = module
        self.modules.setdefault(module, why)

    def add_input(self, layer: str, why: str) -> None:
        """Cuts before a grouped convolution, too."""
        self.modules.setdefault(input_of(layer), why)

    @property
    def any_gather(self) -> bool:
        """Whether any layer picks some channels of its input."""
        return any(module.endswith(input_of("")) for module in self.modules)

    def gathers(self, layer: str) -> bool:
        """Whether the layer picks some channels of its input."""
        return input_of(layer) in self.modules


def connected(book: Book, cut: dict[str, str], *, adds: bool = True) -> Nodes:
    """The root of every node, with these boundaries cut."""
    edges = [*book.edges, *(book.adds if adds else [])]
    edges += [(b.inner, b.outer) for b in book.boundaries if b.module not in cut]
    return book.components(edges)


def present_cuts(found: Survey) -> Cuts:
    """The expansions that the model carries already; they stay."""
    cuts = Cuts()
    for layer in found.layers:
        norm = found.cuts_at_norm.get(layer)
        if norm in found.expanded or layer in found.expanded:
            cuts.add(found, layer, PRESENT)
            if norm not in found.expanded:
                cuts.layers[layer] = layer
    cuts.modules = dict.fromkeys([*found.expanded, *map(input_of, found.gathering)], PRESENT)
    return cuts


def residual_cuts(found: Survey, cuts: Cuts) -> None:
    """Cuts behind every layer that writes into a stream: into channels that an addition of activations couples."""
    book = found.book
    whole = connected(book, cuts.modules)
    apart = connected(book, cuts.modules, adds=False)
    streams = np.zeros(book.num_nodes, dtype=bool)
    for a, b in book.adds:
        streams[whole[a[apart[a] != apart[b]]]] = True
    for nodes in found.outputs:
        streams[whole[nodes]] = False
    for layer, facts in found.layers.items():
        if not facts.votes or facts.outputs is None or layer in cuts.layers:
            continue
        if streams[whole[facts.outputs]].any():
            cuts.add(found, layer, STREAM)

"""What a trace writes down: integer nodes for positions of tensors, and what holds between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Book", "Boundary", "Nodes", "input_of"]

Nodes = np.ndarray  # int64 vector, one node per position along a dim


def input_of(module: str) -> str:
    """The name that a module's input goes by among boundaries and cuts."""
    return f"{module}@input"


@dataclass(eq=False)
class Boundary:
    """The output of one call of a layer or norm, or the input of a grouped convolution: where an expansion may cut.

    Attributes:
        module: Name of the module, or `input_of` it.
        dim: Channel dim of that output or input.
        inner: Nodes of the channels as the module makes or reads them.
        outer: Nodes that everything else sees; joined to `inner` unless the boundary is cut.
        norm: Name of the channel-wise norm that alone reads this output, if there is one.
    """

    module: str
    dim: int
    inner: Nodes
    outer: Nodes
    norm: str | None = None


@dataclass(eq=False)
class Book:
    """Nodes stand for (tensor, dim, position); node 0 is "constant", always frozen.

    A table entry whose name starts with "@" is no tensor: "@attribute" entries are numbers that a module
    keeps beside its tensors, "@boundary" entries the two sides of a `Boundary`.

    Attributes:
        tables: (name, dim) of every allocated range, in order.
        starts: First node of every range, then the number of nodes.
        edges: Pairs of equally long vectors: position by position in the same unit.
        adds: The same, written by an addition of two activations.
        frozen: Nodes that cannot go, each with the reason.
        soft: Nodes that may go, but not without changing what the rest computes, each with the reason.
        boundaries: The outputs of layers and norms, in the order of the calls.
    """

    tables: list[tuple[str, int]] = field(default_factory=lambda: [("@constant", 0)])
    starts: list[int] = field(default_factory=lambda: [0, 1])
    edges: list[tuple[Nodes, Nodes]] = field(default_factory=list)
    adds: list[tuple[Nodes, Nodes]] = field(default_factory=list)
    frozen: list[tuple[Nodes, str]] = field(default_factory=list)
    soft: list[tuple[Nodes, str]] = field(default_factory=list)
    boundaries: list[Boundary] = field(default_factory=list)
    _ranges: dict[tuple[str, int], Nodes] = field(default_factory=dict)
    _tensors: dict[str, list[Nodes]] = field(default_factory=dict)
    _whole: dict[int, tuple[int, Nodes]] = field(default_factory=dict)  # id of the vector of a whole range to its table

    @property
    def num_nodes(self) -> int:
        """Nodes allocated so far, the constant one included."""
        return self.starts[-1]

    def nodes(self, name: str, dim: int, size: int) -> Nodes:
        """The nodes of that dim of that tensor, allocated on first sight."""
        key = (name, dim)
        if key not in self._ranges:
            self._ranges[key] = self.fresh(name, size, dim)
        return self._ranges[key]

    def all_nodes(self, name: str, shape: Sequence[int]) -> list[Nodes]:
        """Per dim, the nodes of that tensor."""
        known = self._tensors.get(name)
        if known is None:
            known = self._tensors[name] = [self.nodes(name, dim, size) for dim, size in enumerate(shape)]
        return known

    def fresh(self, name: str, size: int, dim: int = 0) -> Nodes:
        """Nodes of their own, whatever was allocated under that name before."""
        start = self.starts[-1]
        nodes = np.arange(start, start + size)
        self._whole[id(nodes)] = (len(self.tables), nodes)
        self.tables.append((name, dim))
        self.starts.append(start + size)
        return nodes

    def range_of(self, nodes: Nodes) -> tuple[int, int] | None:
        """First node, and the one after the last, where the vector is that of a whole range."""
        known = self._whole.get(id(nodes))
        return None if known is None else (self.starts[known[0]], self.starts[known[0] + 1])

    def join(self, a: Nodes, b: Nodes) -> None:
        """Position i of `a` and position i of `b` are in one unit."""
        if a is not b:
            self.edges.append((a, b))

    def join_rows(self, table: Nodes) -> None:
        """All nodes in a row of a (units, width) table are in one unit."""
        for column in range(1, table.shape[1]):
            self.edges.append((table[:, 0], table[:, column]))

    def freeze(self, nodes: Nodes | None, reason: str) -> None:
        """These nodes cannot go."""
        if nodes is not None:
            self.frozen.append((nodes, reason))

    def soften(self, nodes: Nodes | None, reason: str) -> None:
        """These nodes can go, but the rest then computes something else."""
        if nodes is not None:
            self.soft.append((nodes, reason))

    def components(self, edges: Iterable[tuple[Nodes, Nodes]]) -> Nodes:
        """The smallest node that each node is connected with by these edges.

        Most edges join whole ranges: these are joined first, as ranges. For the rest, roots are hooked to smaller roots,
        then every pointer jumps to its root, until nothing moves.
        """
        first = list(range(len(self.tables)))  # range to a range before it that it is joined with

        def first_of(table: int) -> int:
            while first[table] != table:
                first[table] = table = first[first[table]]
            return table

        rest = []
        for a, b in edges:
            known, other = self._whole.get(id(a)), self._whole.get(id(b))
            if known is None or other is None:
                rest.append((a, b))
                continue
            s, t = first_of(known[0]), first_of(other[0])
            first[max(s, t)] = min(s, t)
        starts = np.array(self.starts)
        shifts = starts[:-1] - starts[[first_of(table) for table in range(len(first))]]
        root = np.arange(self.num_nodes) - np.repeat(shifts, np.diff(starts))
        return _hooked(root, rest) if rest else root


def _hooked(root: Nodes, edges: list[tuple[Nodes, Nodes]]) -> Nodes:
    """The roots with these edges, too."""
    a, b = (np.concatenate([np.ravel(edge[side]) for edge in edges]) for side in (0, 1))
    while True:
        root_a, root_b = root[a], root[b]
        moving = np.flatnonzero(root_a != root_b)
        if not len(moving):
            return root
        a, b, root_a, root_b = a[moving], b[moving], root_a[moving], root_b[moving]
        # of several writes to one place one stays; the others are hooked next time
        root[np.maximum(root_a, root_b)] = np.minimum(root_a, root_b)
        while not np.array_equal(jumped := root[root], root):
            root = jumped

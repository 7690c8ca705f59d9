"""What a trace writes down: integer nodes for positions of tensors, and what holds between them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Book", "Boundary", "Nodes", "components"]

Nodes = np.ndarray  # int64 vector, one node per position along a dim


@dataclass(eq=False)
class Boundary:
    """The output of one call of a layer or norm: the place where an expansion may cut.

    Attributes:
        module: Name of the module.
        dim: Channel dim of its output.
        inner: Nodes of the output's channels as the module made them.
        outer: Nodes that everything downstream sees; joined to `inner` unless the boundary is cut.
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

    def fresh(self, name: str, size: int, dim: int = 0) -> Nodes:
        """Nodes of their own, whatever was allocated under that name before."""
        start = self.starts[-1]
        self.tables.append((name, dim))
        self.starts.append(start + size)
        return np.arange(start, start + size)

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


def components(num_nodes: int, edges: list[tuple[Nodes, Nodes]]) -> Nodes:
    """The smallest node that each node is connected with.

    Roots are hooked to smaller roots, then every pointer jumps to its root, until nothing moves.
    """
    root = np.arange(num_nodes)
    if not edges:
        return root
    a, b = (np.concatenate([np.ravel(edge[side]) for edge in edges]) for side in (0, 1))
    while True:
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        moving = low != high
        if not moving.any():
            return root
        a, b, low, high = a[moving], b[moving], low[moving], high[moving]
        np.minimum.at(root, high, low)
        while not np.array_equal(jumped := root[root], root):
            root = jumped

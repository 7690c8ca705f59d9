"""The constraints that a trace collects: labels that must be pruned together, and labels that must stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from gflow_pl.values import SizeAttribute

__all__ = ["FIXED", "Auxiliary", "Boundary", "BoundaryKey", "Constraints", "Labels", "Source", "TensorDim"]

Labels = np.ndarray
"""(positions,) int64: one label for every position along a dimension of a tensor."""

FIXED = 0
"""Label of positions that can never be removed, such as zeros that a padding adds."""


class TensorDim(NamedTuple):
    """A dimension of a parameter or buffer.

    Attributes:
        tensor: Name of the parameter or buffer, as in ``named_parameters()`` or ``named_buffers()``.
        dim: The dimension.
    """

    tensor: str
    dim: int


class Auxiliary(Enum):
    """Sources of labels that no tensor and no module owns.

    Attributes:
        FIXED: The label `FIXED`.
        BOUNDARY: The other side of a `Boundary`.
        SUM: The result of an addition of two activations.
        BROADCAST: A dimension that was broadcast, and can have any size.
    """

    FIXED = 0
    BOUNDARY = 1
    SUM = 2
    BROADCAST = 3


Source = TensorDim | SizeAttribute | Auxiliary
"""What a range of labels was created for: the positions of a tensor, the units of a count that a module keeps, or
neither.
"""


class BoundaryKey(NamedTuple):
    """The output of a module, or its input.

    Attributes:
        module: Name of the module, as in ``named_modules()``.
        is_input: Whether it is the input.
    """

    module: str
    is_input: bool = False


@dataclass(eq=False)
class Boundary:
    """The output of one call of a layer or norm, or the input of a grouped convolution: where an expansion may apply.

    Attributes:
        key: The module and its side.
        dim: Channel dimension of that output or input.
        inner: Labels of the channels as the module computes or reads them.
        outer: Labels that all other operators see. They are joined to `inner` unless the boundary is expanded.
        norm: Name of the channel-wise norm that alone reads this output, if there is one.
    """

    key: BoundaryKey
    dim: int
    inner: Labels
    outer: Labels
    norm: str | None = None


@dataclass(eq=False)
class Constraints:
    """Labels, and what a trace found about them.

    A label is a whole number that stands for one position of one `Source`. Label `FIXED` always stays.

    Attributes:
        sources: The source of every allocated range of labels, in the order of allocation.
        starts: First label of every range, then the number of labels.
        edges: Pairs of equally long label vectors. Labels at the same position are pruned together.
        adds: Pairs like `edges`, from additions of two activations.
        frozen: Labels that must stay, each with the reason.
        inexact: Labels that may be removed although this changes what other channels compute, each with the reason.
        boundaries: The outputs of layers and norms and the inputs of grouped convolutions, in the order of the calls.
    """

    sources: list[Source] = field(default_factory=lambda: [Auxiliary.FIXED])
    starts: list[int] = field(default_factory=lambda: [FIXED, FIXED + 1])
    edges: list[tuple[Labels, Labels]] = field(default_factory=list)
    adds: list[tuple[Labels, Labels]] = field(default_factory=list)
    frozen: list[tuple[Labels, str]] = field(default_factory=list)
    inexact: list[tuple[Labels, str]] = field(default_factory=list)
    boundaries: list[Boundary] = field(default_factory=list)
    _by_source: dict[Source, Labels] = field(default_factory=dict)
    _by_tensor: dict[str, list[Labels]] = field(default_factory=dict)
    _ranges: dict[int, tuple[int, Labels]] = field(default_factory=dict)  # id of a range's vector to the range's number

    @property
    def num_labels(self) -> int:
        """Number of labels allocated so far, `FIXED` included."""
        return self.starts[-1]

    def labels_of(self, source: TensorDim | SizeAttribute, size: int) -> Labels:
        """Return the labels of a source, which are allocated at the first call.

        Args:
            source: The source.
            size: Number of its positions. Only the first call reads it.
        """
        if source not in self._by_source:
            self._by_source[source] = self.new_labels(source, size)
        return self._by_source[source]

    def has(self, source: TensorDim | SizeAttribute) -> bool:
        """Return whether a source has labels."""
        return source in self._by_source

    def labels_of_tensor(self, name: str, shape: Sequence[int]) -> list[Labels]:
        """Return the labels of a parameter or buffer, a vector for every dimension."""
        known = self._by_tensor.get(name)
        if known is None:
            known = [self.labels_of(TensorDim(name, dim), size) for dim, size in enumerate(shape)]
            self._by_tensor[name] = known
        return known

    def has_tensor(self, name: str) -> bool:
        """Return whether a parameter or buffer has labels, because an operator has read it."""
        return name in self._by_tensor

    def new_labels(self, source: Source, size: int) -> Labels:
        """Allocate a new range of labels, even if the source has some.

        Returns:
            (size,) consecutive labels.
        """
        start = self.starts[-1]
        labels = np.arange(start, start + size)
        self._ranges[id(labels)] = (len(self.sources), labels)
        self.sources.append(source)
        self.starts.append(start + size)
        return labels

    def ranges(self) -> Iterator[tuple[Source, int, int]]:
        """Yield every source (a tensor dimension or attribute), its first label and the label after its last."""
        for source, (start, stop) in zip(self.sources, pairwise(self.starts), strict=True):
            yield source, start, stop

    def range_of(self, labels: Labels) -> tuple[int, int] | None:
        """Return the first label and the one after the last if the vector is a whole allocated range, else None."""
        known = self._ranges.get(id(labels))
        return None if known is None else (self.starts[known[0]], self.starts[known[0] + 1])

    def is_broadcast(self, labels: Labels) -> bool:
        """Return whether a vector is that of a dimension that was broadcast."""
        known = self._ranges.get(id(labels))
        return known is not None and self.sources[known[0]] is Auxiliary.BROADCAST

    def join(self, a: Labels, b: Labels) -> None:
        """Require that label i of `a` and label i of `b` are pruned together, for every i."""
        if a is not b:
            self.edges.append((a, b))

    def join_rows(self, table: np.ndarray) -> None:
        """Require that all labels in a row are pruned together, for every row of a (units, width) table."""
        for column in range(1, table.shape[1]):
            self.edges.append((table[:, 0], table[:, column]))

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """Require that these labels stay; do nothing for None."""
        if labels is not None:
            self.frozen.append((labels, reason))

    def mark_inexact(self, labels: Labels | None, reason: str) -> None:
        """Note that the removal of these labels changes what other channels compute; do nothing for None."""
        if labels is not None:
            self.inexact.append((labels, reason))

    def components(self, edges: Iterable[tuple[Labels, Labels]]) -> Labels:
        """Return, for every label, the smallest label that these edges connect it with.

        Args:
            edges: Pairs of equally long label vectors.

        Returns:
            (labels,) the root of every label. Two labels are connected if their roots are equal.
        """
        # Most edges join whole ranges. These are merged first, as ranges.
        first = list(range(len(self.sources)))  # number of a range to that of an earlier range that it is joined with

        def first_of(number: int) -> int:
            while first[number] != number:
                first[number] = number = first[first[number]]
            return number

        rest = []
        for a, b in edges:
            known, other = self._ranges.get(id(a)), self._ranges.get(id(b))
            if known is None or other is None:
                rest.append((a, b))
                continue
            s, t = first_of(known[0]), first_of(other[0])
            first[max(s, t)] = min(s, t)

        # The merged ranges give every label its root; the other edges are merged label by label.
        starts = np.array(self.starts)
        shifts = starts[:-1] - starts[[first_of(number) for number in range(len(first))]]
        root = np.arange(self.num_labels) - np.repeat(shifts, np.diff(starts))
        return _merge_roots(root, rest) if rest else root


def _merge_roots(root: Labels, edges: list[tuple[Labels, Labels]]) -> Labels:
    """Return the roots after these edges are added.

    In every pass the larger root of an edge is pointed to the smaller one, then all pointers are followed to their
    ends.

    Args:
        root: (labels,) roots without the edges; changed in place.
        edges: Pairs of equally long label vectors.
    """
    a, b = (np.concatenate([np.ravel(edge[side]) for edge in edges]) for side in (0, 1))
    while True:
        root_a, root_b = root[a], root[b]
        open_edges = np.flatnonzero(root_a != root_b)
        if not len(open_edges):
            return root
        a, b, root_a, root_b = a[open_edges], b[open_edges], root_a[open_edges], root_b[open_edges]
        # Of several writes to one root a single one remains; the next pass handles the others.
        root[np.maximum(root_a, root_b)] = np.minimum(root_a, root_b)
        while not np.array_equal(jumped := root[root], root):
            root = jumped

"""Compare the operators of a forward pass at smaller shapes with the recorded ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from gflow_pl.channels.constraints import Constraints, Labels
from gflow_pl.channels.data_flow import LAYOUT_DEPENDENT, Sources
from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.operator_record import Number, OperatorRecord
from gflow_pl.channels.placeholder_mode import OperatorInputs, PlaceholderMode, cloned_output, collect_inputs

__all__ = ["FlowMismatch", "Mismatch", "ReplayMode"]

OTHER_PATH = "the forward takes another path at smaller shapes"
OTHER_TENSORS = "the forward reads other tensors at smaller shapes"

# Operators whose int arguments are sizes: these show in the shapes of the outputs.
_TAKES_SIZES = frozenset(
    """view _unsafe_view reshape _reshape_alias expand repeat split split_with_sizes unsafe_split
    unsafe_split_with_sizes chunk new_zeros new_ones new_empty zeros ones empty empty_strided new_empty_strided
    native_layer_norm _fused_rms_norm native_group_norm convolution _convolution slice as_strided arange channel_shuffle
    native_channel_shuffle""".split()  # noqa: SIM905
)
# Operators whose int arguments are positions and dimensions, where another number means another element.
_TAKES_POSITIONS = frozenset(
    """select slice roll flip transpose t permute unfold diagonal topk sort kthvalue constant_pad_nd tril triu gather
    select_scatter slice_scatter index_select cat stack squeeze
    unsqueeze""".split()  # noqa: SIM905
)
# Operators that take a shape, followed by the value to fill it with.
_TAKES_FILL_VALUE = frozenset(["full", "new_full"])


class Mismatch(Exception):
    """An operator behaved differently from what its record predicts."""


class FlowMismatch(Mismatch):
    """The forward called another operator, or one on other tensors, than its record says."""


class ReplayMode(PlaceholderMode):
    """Runs a forward pass at smaller shapes next to its records, and raises `Mismatch` at the first size that differs.

    Args:
        runner: The model and its inputs.
        placeholders: See `PlaceholderMode`; at the smaller shapes.
        records: The records of the same forward pass at full shapes.
        constraints: The constraints of that record.
        removed: (labels,) whether a label is removed.

    Attributes:
        differing: Numbers of the operators that were called with another plain number than at full shapes.
        is_in_operator: Whether an operator is running; after an error, whether an operator or the code between two of
            them raised it.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        placeholders: Mapping[int, Tensor],
        records: Sequence[OperatorRecord],
        constraints: Constraints,
        removed: Labels,
    ) -> None:
        flow = runner.data_flow(placeholders, is_recorded=False)
        super().__init__(placeholders, runner.meta, runner.shape_cache, flow)
        self.replaces_real = bool(runner.copies.tensors)
        self.differing: list[int] = []
        self.is_in_operator = False
        self._records, self._constraints, self._removed = records, constraints, removed
        self._num_removed_before = np.concatenate([[0], np.cumsum(removed)])
        self._kept_counts: dict[int, int] = {}  # id of a label vector to the number of its labels that are kept
        self._current = -1  # number of the last operator that was matched with its record
        self._following = 0  # number of the next one to match
        self._skip_layout_dependent()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator, or continue with its recorded output, and compare it with its record."""
        name = func._schema.name.removeprefix("aten::")
        args, kwargs, inputs = self.prepare(name, args, kwargs or {})
        is_compared = name not in LAYOUT_DEPENDENT
        if is_compared and self._was_decomposed(func, name):
            with self:
                return func.decompose(*args, **kwargs)
        self.is_in_operator = True
        record = self._next_record(name) if is_compared else None
        if record is not None and record.sources != self.sources(name, inputs.tensors):
            raise FlowMismatch(OTHER_TENSORS)
        recorded = None if record is None else record.output
        output = self.compute(func, args, kwargs) if recorded is None else cloned_output(recorded)
        self.keep_alive.append(output)
        outputs: list[Tensor] = []
        collect_inputs((output,), outputs, [])
        self.add_results(name, outputs, inputs.tensors)
        if record is not None:
            self._compare(record, outputs, inputs, args)
        self.is_in_operator = False
        return output

    def check_end(self, outputs: Iterable[Tensor], sources: Sources) -> None:
        """Compare the end of the forward with the record.

        Args:
            outputs: The outputs of the forward.
            sources: Where the recorded ones come from.

        Raises:
            FlowMismatch: The record has further operators, or the outputs come from elsewhere.
        """
        if self._following < len(self._records):
            raise FlowMismatch(OTHER_PATH)
        if self.flow.sources(outputs) != sources:
            raise FlowMismatch(OTHER_TENSORS)

    # -- the matching record -----------------------------------------------------------------------------------------

    @property
    def failed_at(self) -> int:
        """After an error, the number of the operator that failed, or of the next one if code between two raised it."""
        is_in_operator = self.is_in_operator or self._following == len(self._records)
        return self._current if is_in_operator else self._following

    def _skip_layout_dependent(self) -> None:
        """Advance to the next recorded operator that does not depend on memory layouts."""
        while self._following < len(self._records) and self._records[self._following].name in LAYOUT_DEPENDENT:
            self._following += 1

    def _is_following(self, name: str) -> bool:
        if self._following == len(self._records):
            return False
        return _canonical_name(self._records[self._following].name) == _canonical_name(name)

    def _was_decomposed(self, func: OpOverload, name: str) -> bool:
        """Return whether the recorder saw the operators that this one decomposes into.

        In inference mode, torch passes composite operators to a dispatch mode without decomposing them.
        """
        return not self._is_following(name) and func._can_decompose()

    def _next_record(self, name: str) -> OperatorRecord:
        is_following = self._is_following(name)
        self._current = self._following
        self._following = min(self._following + 1, len(self._records))
        self._skip_layout_dependent()
        if not is_following:
            raise FlowMismatch(OTHER_PATH)
        return self._records[self._current]

    # -- comparisons -------------------------------------------------------------------------------------------------

    def _compare(
        self, record: OperatorRecord, outputs: list[Tensor], inputs: OperatorInputs, args: tuple[Any, ...]
    ) -> None:
        """Compare sizes, counts and numbers of an operator with its record."""
        # Every labelled dimension of the outputs has lost exactly its removed labels.
        for output, shape, labels in zip(outputs, record.shapes, record.output_labels, strict=True):
            if labels is None:
                continue
            for dim, (size, vector) in enumerate(zip(shape, labels, strict=True)):
                expected = size if vector is None else self._num_kept(vector)
                if output.shape[dim] != expected:
                    raise Mismatch(f"a size that does not follow the channels ('{record.name}')")
        for position, vector in record.expected_counts:
            if args[position] != self._num_kept(vector):
                raise Mismatch(f"a position that does not follow the channels ('{record.name}')")

        # Another plain number changes values, but no shape.
        sizes_differ = record.operand_shapes is not None and record.operand_shapes != [x.shape for x in inputs.tensors]
        if sizes_differ or not _are_equal(_comparable(record, record.numbers), _comparable(record, inputs.numbers)):
            if record.name in _TAKES_POSITIONS:
                raise Mismatch(f"a position that does not follow the channels ('{record.name}')")
            if _settings(record.numbers) != _settings(inputs.numbers):
                raise FlowMismatch(OTHER_PATH)
            self.differing.append(self._current)

    def _num_kept(self, labels: Labels) -> int:
        """Return how many of these labels are kept. The record holds the vector, so its id stays unique."""
        whole_range = self._constraints.range_of(labels)
        if whole_range is not None:
            start, stop = whole_range
            return len(labels) - int(self._num_removed_before[stop] - self._num_removed_before[start])
        known = self._kept_counts.get(id(labels))
        if known is None:
            known = len(labels) - int(np.count_nonzero(self._removed[labels]))
            self._kept_counts[id(labels)] = known
        return known


def _canonical_name(name: str) -> str:
    """Return one name for all reshaping operators: which one is called depends on whether memory has to be copied."""
    return "view" if name in ("_unsafe_view", "_reshape_alias", "reshape") else name


def _comparable(record: OperatorRecord, numbers: tuple[Number, ...]) -> tuple[Number, ...]:
    """Return the numbers among an operator's arguments that no shape reflects."""
    if record.name in _TAKES_FILL_VALUE:
        return numbers[len(record.shapes[0]) :]
    if record.name not in _TAKES_SIZES or _has_fixed_outputs(record):
        return numbers
    if record.name == "convolution":
        return numbers[:-1]  # the number of groups may follow the channels
    if record.name == "slice":
        labels, dim = record.output_labels[0], numbers[0] if numbers else 0
        if labels is not None and isinstance(dim, int) and labels[dim] is None:
            return numbers
    return tuple(number for number in numbers if not isinstance(number, int))


def _settings(numbers: tuple[Number, ...]) -> list[Number]:
    """Return the strings and dtypes among an operator's arguments."""
    return [value for value in numbers if isinstance(value, (str, torch.dtype))]


def _has_fixed_outputs(record: OperatorRecord) -> bool:
    """Return whether no dimension of the outputs can change its size."""
    return all(labels is not None and all(vector is None for vector in labels) for labels in record.output_labels)


def _are_equal(a: tuple[Number, ...], b: tuple[Number, ...]) -> bool:
    """Return whether two tuples hold the same numbers, where NaN counts as equal to NaN."""
    if a == b:
        return True
    return len(a) == len(b) and all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True))

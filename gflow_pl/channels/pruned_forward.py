"""Run a model's forward as it would run without some of its channels."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from gflow_pl.channels.constraints import Boundary, BoundaryKey, Labels, TensorDim
from gflow_pl.channels.data_flow import DataFlow
from gflow_pl.channels.expansions import Expansions
from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.placeholder_mode import PlaceholderMode
from gflow_pl.channels.record import Record
from gflow_pl.values import SizeAttribute
from gflow_pl.values.module_sizes import shape_attributes

__all__ = ["PrunedForward"]


class PrunedForward:
    """The forward of a model without the removed labels: smaller placeholders, smaller counts, and the expansions.

    Args:
        runner: The model and its inputs.
        record: The record of the model.
        expansions: The layers that are expanded.
        removed: (labels,) whether a label is removed.
        unchanged: Numbers of modules that keep their values although they count labels.

    Attributes:
        placeholders: id of a parameter or buffer to its placeholder without the removed positions.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        record: Record,
        expansions: Expansions,
        removed: Labels,
        unchanged: Collection[SizeAttribute] = (),
    ) -> None:
        self._runner, self._record, self._expansions, self._removed = runner, record, expansions, removed
        kept: dict[str, dict[int, Labels]] = {}
        self._sizes: list[tuple[SizeAttribute, int]] = []  # numbers that the trace found to count labels
        for source, start, stop in record.constraints.ranges():
            if isinstance(source, TensorDim):
                if removed[start:stop].any():
                    kept.setdefault(source.tensor, {})[source.dim] = np.flatnonzero(~removed[start:stop])
            elif isinstance(source, SizeAttribute) and source not in unchanged and source not in record.unneeded:
                self._sizes.append((source, stop - start - int(removed[start:stop].sum())))
        self.placeholders = runner.placeholders(kept)

    @contextmanager
    def prepared(self, training: bool) -> Iterator[None]:
        """Set placeholders and counts in the model for the block."""
        with self._runner.placeholders_set(self.placeholders, training):
            self._set_attributes()
            yield

    def run(self, mode: PlaceholderMode) -> Any:
        """Run the forward under a dispatch mode and return its output; call it inside `prepared`."""
        before = partial(self._gather, mode.flow) if self._expansions.has_gathers else None
        after = partial(self._scatter, mode.flow) if self._expansions.boundaries else None
        return self._runner.run(mode, before, after)

    def _set_attributes(self) -> None:
        """Set the numbers that modules keep beside their tensors."""
        # Those that follow from the shapes of a module's own tensors, such as `in_channels`.
        for module in self._runner.accessible_modules:
            tensors: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
            parametrizations = module._modules.get("parametrizations")
            if parametrizations is not None:
                tensors.update(parametrizations.named_parameters(prefix="parametrizations"))
            shapes = {name: tuple(x.shape) for name, x in tensors.items() if x is not None}
            for name, value in shape_attributes(module, shapes).items():
                if name in vars(module):
                    vars(module)[name] = value

        # Those that the trace found to count labels.
        for attribute, size in self._sizes:
            for module in self._runner.modules_like(attribute.module):
                _set_attribute(module, attribute, size)

    def _gather(self, flow: DataFlow, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give a grouped convolution whose input is gathered the channels of its remaining groups."""
        boundary = self._expanded_boundary(BoundaryKey(name, is_input=True))
        if boundary is None or name in self._record.gathering or not args or not isinstance(args[0], Tensor):
            return None
        with _disable_current_modes():
            gathered = args[0].index_select(boundary.dim, self._kept_channels(boundary, args[0]))
        flow.add_stand_in(gathered, args[0])
        return gathered, *args[1:]

    def _scatter(self, flow: DataFlow, name: str, module: nn.Module, output: object) -> Tensor | None:
        """Scatter the output of an expanded layer into zeros of the full width; present expansions do so themselves."""
        boundary = self._expanded_boundary(BoundaryKey(name))
        if boundary is None or name in self._record.expanded or not isinstance(output, Tensor):
            return None
        shape = list(output.shape)
        shape[boundary.dim] = len(boundary.inner)
        with _disable_current_modes():
            full = torch.zeros(shape, dtype=output.dtype, device=output.device)
            if not self._runner.meta:
                full.index_copy_(boundary.dim, self._kept_channels(boundary, output), output)
        flow.add_stand_in(full, output)
        return full

    def _expanded_boundary(self, key: BoundaryKey) -> Boundary | None:
        if key not in self._expansions.boundaries:
            return None
        return next((boundary for boundary in self._record.constraints.boundaries if boundary.key == key), None)

    def _kept_channels(self, boundary: Boundary, x: Tensor) -> Tensor:
        """Return the positions of a boundary that are kept, on the device of a tensor."""
        return torch.from_numpy(np.flatnonzero(~self._removed[boundary.inner])).to(x.device)


def _set_attribute(module: nn.Module, attribute: SizeAttribute, value: int) -> None:
    """Set a whole number that a module keeps, either as an attribute or as an element of a list or tuple."""
    attributes = vars(module)
    if attribute.element is None:
        attributes[attribute.name] = value
        return
    present = attributes[attribute.name]
    elements = list(present)
    elements[attribute.element] = value
    attributes[attribute.name] = tuple(elements) if type(present) is tuple else elements

"""Hooks around every module of a recorded forward pass: they collect facts about layers, norms and their boundaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import _disable_current_modes

from gflow_pl.channels.checked_sizes import count_checked_sizes
from gflow_pl.channels.constraints import FIXED, Auxiliary, Boundary, BoundaryKey
from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.functional_layers import FunctionalLayers
from gflow_pl.channels.record import LayerFacts, Record
from gflow_pl.channels.recorder import Recorder
from gflow_pl.common.nested import iter_tensors

__all__ = ["LayerHooks"]

_Layer = _ConvNd | nn.Linear

# Names of the tensor that holds a layer's weight: the plain one, and those of the weight norm and spectral norm hooks.
_WEIGHTS = ("weight", "weight_v", "weight_orig")
_PARAMETRIZED = ("original", "original1")


class _ModuleKind(NamedTuple):
    """What kind of module a module is.

    Attributes:
        is_norm: Whether it is a normalization layer.
        is_channel_norm: Whether it normalizes every channel separately.
        is_grouped: Whether it is a convolution with several groups, and not a transposed one.
    """

    is_norm: bool
    is_channel_norm: bool
    is_grouped: bool

    @classmethod
    def of(cls, module: nn.Module) -> _ModuleKind:
        """Return the kind of a module."""
        is_channel_norm = _is_channel_norm(module)
        return cls(
            is_norm=is_channel_norm or isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)),
            is_channel_norm=is_channel_norm,
            is_grouped=isinstance(module, _ConvNd) and module.groups > 1 and not module.transposed,
        )


def _is_channel_norm(module: nn.Module) -> bool:
    """Return whether a module normalizes every channel separately, so that removing one leaves the others unchanged."""
    if isinstance(module, _NormBase):
        return True
    tensors = {**module._parameters, **module._buffers}  # scripted modules cannot be iterated, but unpacked
    return {"weight", "bias", "running_mean", "running_var"} <= tensors.keys()


class LayerHooks:
    """The hooks of one recorded forward pass.

    They tell the recorder which module is running, and write into the record what the layers show. Each layer's output
    gets a `Boundary`: the layer knows its channels by the inner labels, everything that reads them by the outer ones.

    Args:
        record: The record to fill.
        recorder: The recorder of this pass.
        runner: The model and its inputs.
        names: id of a parameter or buffer, or of its placeholder, to its name.
        training: Whether the pass is in training mode.
        checked_sizes: Class of modules to the names of their numbers that count channels, see `CheckedSizes`.
    """

    def __init__(
        self,
        record: Record,
        recorder: Recorder,
        runner: ForwardRunner,
        names: Mapping[int, str],
        training: bool,
        checked_sizes: Mapping[type[nn.Module], Sequence[str]],
    ) -> None:
        self._checked_sizes = checked_sizes
        self._record, self._recorder, self._names, self._training = record, recorder, names, training
        self._table, self._constraints = recorder.table, record.constraints
        self._runner = runner
        self._kinds = {name: _ModuleKind.of(module) for name, module in runner.modules.items()}
        self._input_ids = {id(x) for x in runner.inputs}
        self._layer_of_label: dict[int, LayerFacts] = {}  # first outer label of a layer's output to the layer
        self._boundary_of_output: dict[int, tuple[LayerFacts, Boundary]] = {}  # by the id of a layer's output
        self._functional = FunctionalLayers(record, recorder, runner, names, training)

    # -- before a module ---------------------------------------------------------------------------------------------

    def before(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Add a module that starts to the recorder's stack, and relabel the input of a grouped convolution.

        Returns:
            The arguments to call the module with, or None to call it with those given.
        """
        self._recorder.module_stack.append((name, module))
        x = args[0] if args and isinstance(args[0], Tensor) else None
        self._recorder.module_inputs.append(x)
        if self._checked_sizes:
            self._count_checked_sizes(args)
        kind = self._kinds[name]
        if x is not None and kind.is_norm:
            self._note_norm(name, x)
        if x is not None and kind.is_grouped and isinstance(module, _ConvNd) and name not in self._record.gathering:
            return self._input_boundary(name, module, x), *args[1:]
        return None

    def _count_checked_sizes(self, tensors: object) -> None:
        """Let numbers of the running module count channels of tensors that it got from elsewhere."""
        if not self._recorder.module_stack:
            return
        name, module = self._recorder.module_stack[-1]
        names = self._checked_sizes.get(type(module), ())
        for tensor in iter_tensors(tensors) if names else ():
            count_checked_sizes(name, module, names, tensor, self._table, self._constraints)

    def _note_norm(self, name: str, x: Tensor) -> None:
        """Note that a norm belongs to the layer whose channels it reads, even if activations lie between."""
        labels = self._table.info(x).labels
        for dim in (1, -1) if x.ndim > 1 else (-1,):
            vector = labels[dim] if x.ndim else None
            if vector is None or not len(vector):
                continue
            facts = self._layer_of_label.get(int(vector[0])) or self._functional.of_label.get(int(vector[0]))
            if facts is None or facts.num_filters != len(vector):
                continue
            if facts.norm is None:
                facts.norm = name
            output = self._boundary_of_output.get(id(x))
            if output is not None and self._kinds[name].is_channel_norm:
                output[1].norm = name
            return

    def _input_boundary(self, name: str, module: _ConvNd, x: Tensor) -> Tensor:
        """Return the input of a grouped convolution under new labels, so that the convolution can gather channels."""
        dim = _channel_dim(module)
        info = self._table.info(x)
        outer = info.labels[dim]
        if outer is None:
            outer = np.full(x.shape[dim], FIXED, np.int64)
        with _disable_current_modes():
            alias = x.detach()
        self._recorder.flow.add_stand_in(alias, x)
        labels = list(info.labels)
        labels[dim] = inner = self._constraints.new_labels(Auxiliary.BOUNDARY, len(outer))
        self._constraints.boundaries.append(Boundary(BoundaryKey(name, is_input=True), dim, inner, outer))
        self._table.set_labels(alias, labels, info.zero_dims, is_activation=info.is_activation)
        if id(x) in self._recorder.readers:
            self._recorder.readers[id(x)].append(name)
        return alias

    # -- behind a module ---------------------------------------------------------------------------------------------

    def after(self, name: str, module: nn.Module, output: object) -> None:
        """Remove a module that has ended from the recorder's stack, and relabel the output of a layer or channel norm.

        For a layer, this also updates the facts about it in the record.
        """
        x = self._recorder.module_inputs.pop()
        self._recorder.module_stack.pop()
        if isinstance(output, Tensor) and output.ndim:
            if isinstance(module, (_ConvNd, nn.Linear)):
                self._note_layer(name, module, x, output)
            elif self._kinds[name].is_channel_norm and output.ndim > 1:
                self._output_boundary(name, output, 1)
            elif found := self._functional.layer_in(name, output):
                facts, dim = found
                facts.module, facts.output_dim = name, dim
                self._note_boundary(facts, output, dim)
        if self._runner.unread:
            known = [(tensor, self._table.info(tensor).labels) for tensor in iter_tensors(output)]
            self._record.module_outputs += [(tensor.shape, list(labels)) for tensor, labels in known]
        if self._checked_sizes:
            self._count_checked_sizes(output)

    def _output_boundary(self, name: str, output: Tensor, dim: int) -> Boundary | None:
        """Give the channels of a module's output new labels for everything that reads them."""
        info = self._table.info(output)
        inner = info.labels[dim]
        if inner is None:
            return None
        if name in self._record.expanded:
            # The output is a scatter already: what reads it does not see these labels.
            return Boundary(BoundaryKey(name), dim, inner, inner)
        outer = self._constraints.new_labels(Auxiliary.BOUNDARY, len(inner))
        boundary = Boundary(BoundaryKey(name), dim, inner, outer)
        self._constraints.boundaries.append(boundary)
        labels = list(info.labels)
        labels[dim] = outer
        info.labels = labels
        return boundary

    def _note_layer(self, name: str, module: _Layer, x: Tensor | None, output: Tensor) -> None:
        """Add what one call of a layer shows to the facts about the layer."""
        # Facts that do not change from call to call.
        facts = self._record.layers.get(name)
        weight = self._weight_of(module) if facts is None else facts.weight
        if weight is None:
            return
        dim = _channel_dim(module)
        if facts is None:
            is_grouped = self._kinds[name].is_grouped
            facts = LayerFacts(name, weight, output.shape[dim], not _is_depthwise(module), is_grouped=is_grouped)
            facts.dim, facts.module, facts.output_dim = int(isinstance(module, _ConvTransposeNd)), name, dim
            self._record.layers[name] = facts

        # The multiply-accumulates of a transposed convolution follow its input, those of other layers their output.
        num_elements, num_channels = output.numel(), output.shape[dim]
        if isinstance(module, _ConvTransposeNd):
            num_elements, num_channels = num_elements if x is None else x.numel(), module.in_channels
        positions = num_elements // max(num_channels, 1) // self._runner.num_examples
        # Of several calls of the model, the first one that runs the layer counts; a copy of the layer does not.
        call = facts.counted_call.setdefault(self._training, self._runner.call_number)
        if call == self._runner.call_number and module is self._runner.modules[name]:
            facts.positions[self._training] = facts.positions.get(self._training, 0) + positions
        facts.reads_input |= id(x) in self._input_ids

        self._note_boundary(facts, output, dim)

    def _note_boundary(self, facts: LayerFacts, output: Tensor, dim: int) -> None:
        """Give the output of a layer new labels for everything that reads it, and find its readers from here on."""
        assert facts.module is not None
        boundary = self._output_boundary(facts.module, output, dim)
        if boundary is None:
            return
        facts.outputs = boundary.inner if facts.outputs is None else facts.outputs
        self._layer_of_label[int(boundary.outer[0])] = facts
        self._boundary_of_output[id(output)] = (facts, boundary)
        self._recorder.readers[id(output)] = []

    def _weight_of(self, layer: nn.Module) -> str | None:
        """Return the name of the tensor that holds a layer's weight, also if a parametrization computes the weight."""
        tensors: list[Tensor | None] = [layer._parameters.get(name) for name in _WEIGHTS]
        parametrized = getattr(layer, "parametrizations", {})
        if "weight" in parametrized:
            tensors = [getattr(parametrized["weight"], name, None) for name in _PARAMETRIZED]
        return next((self._names[id(x)] for x in tensors if x is not None and id(x) in self._names), None)

    # -- after the forward -------------------------------------------------------------------------------------------

    def finish(self, output: object) -> None:
        """Freeze the model's outputs, and note for every layer whether a norm is the only reader of its output."""
        for tensor in iter_tensors(output):
            for dim, labels in enumerate(self._table.info(tensor).labels):
                if labels is not None:
                    self._constraints.freeze(labels, "the model's output")
                    # Channels that were reshaped into the batch dimension are frozen, but do not make their layer an
                    # output.
                    if dim or tensor.ndim == 1:
                        self._record.outputs.append(labels)
            self._recorder.readers.get(id(tensor), []).append("")  # the name of the model itself
        for key, (facts, boundary) in self._boundary_of_output.items():
            only_norm = boundary.norm if set(self._recorder.readers[key]) == {boundary.norm} else None
            known = self._record.expands_at_norm.setdefault(facts.name, only_norm)
            if known != only_norm:
                self._record.expands_at_norm[facts.name] = None


def _channel_dim(layer: _Layer) -> int:
    """Return the channel dimension of a layer's input and output, counted from the end: examples may be unbatched."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)


def _is_depthwise(layer: _Layer) -> bool:
    """Return whether a layer is a convolution with one group per input channel."""
    if isinstance(layer, nn.Linear) or not 1 < layer.groups == layer.in_channels:
        return False
    return not isinstance(layer, _ConvTransposeNd) or layer.groups == layer.out_channels

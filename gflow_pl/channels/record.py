"""One survey of a model: its forward in training and in evaluation mode, recorded into one constraints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import _disable_current_modes

from gflow_pl.channels.constraints import Auxiliary, Boundary, BoundaryKey, Constraints, Labels
from gflow_pl.channels.forward_runner import Stage
from gflow_pl.channels.labels import ChoiceSite
from gflow_pl.channels.recorder import Call, Recorder
from gflow_pl.channels.rules.elementwise import pointwise, unknown
from gflow_pl.channels.rules.registry import RULES
from gflow_pl.common.nested import iter_tensors
from gflow_pl.values.expansion_names import EXPANSION, GATHER

__all__ = ["LayerFacts", "Survey", "is_channel_norm", "survey"]

_WEIGHTS = ("weight", "weight_v", "weight_orig")
_PARAMETRIZED = ("original", "original1")


@dataclass(eq=False)
class LayerFacts:
    """What the calls of one conv, transposed conv or linear layer showed.

    Attributes:
        name: As in ``named_modules()``.
        weight: Name of its weight tensor.
        num_filters: Output channels.
        votes: Whether it is more than a depthwise follower.
        outputs: Labels of its output channels, None if they cannot be told.
        positions: Multiply-accumulates of one example per element of the weight, by mode.
        reads_input: Whether it reads the network's input.
        norm: The first norm that reads its output.
        grouped: Whether it is a convolution of groups that may be cut off from what it reads.
        boundaries: Its outputs, one for every call.
    """

    name: str
    weight: str
    num_filters: int
    votes: bool
    outputs: Labels | None = None
    positions: dict[bool, int] = field(default_factory=dict)
    reads_input: bool = False
    norm: str | None = None
    grouped: bool = False
    boundaries: list[Boundary] = field(default_factory=list)


@dataclass(eq=False)
class Survey:
    """All that is known after both forwards; names and integers only.

    Attributes:
        constraints: Labels and what holds between them.
        calls: Per mode (True = training), every op.
        layers: Facts of the layers, in the order of their first call.
        outputs: Labels that are part of the model's outputs.
        expanded: Modules that carry an expansion already, with its dim and width.
        gathering: Layers that read only some channels of their input already.
        expands_at_norm: Layer name to the channel-wise norm that alone reads its output.
        torn: Per mode, the error that ended the forward early.
        guessed: Whether a rule had to suppose what a size follows.
    """

    constraints: Constraints
    calls: dict[bool, list[Call]] = field(default_factory=dict)
    layers: dict[str, LayerFacts] = field(default_factory=dict)
    outputs: list[Labels] = field(default_factory=list)
    expanded: dict[str, tuple[int, int]] = field(default_factory=dict)
    gathering: set[str] = field(default_factory=set)
    expands_at_norm: dict[str, str | None] = field(default_factory=dict)
    torn: dict[bool, Exception] = field(default_factory=dict)
    guessed: bool = False


def is_channel_norm(module: nn.Module) -> bool:
    """Whether the module normalises every channel by itself, so that a channel may go without the others noticing."""
    if isinstance(module, _NormBase):
        return True
    own = {**module._parameters, **module._buffers}
    return {"weight", "bias", "running_mean", "running_var"} <= own.keys()


class _Kind(NamedTuple):
    """What a module is, as far as a survey asks."""

    layer: bool
    norm: bool
    channel_norm: bool
    grouped: bool

    @classmethod
    def of(cls, module: nn.Module) -> _Kind:
        channel_norm = is_channel_norm(module)
        norm = channel_norm or isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
        grouped = isinstance(module, _ConvNd) and module.groups > 1 and not module.transposed
        return cls(isinstance(module, (_ConvNd, nn.Linear)), norm, channel_norm, grouped)


def _weight_of(name: str, module: nn.Module, first_names: Mapping[int, str]) -> str | None:
    """Name of the tensor that holds the layer's weight, through parametrizations."""
    own: dict[str, Any] = {key: module._parameters.get(key) for key in _WEIGHTS}
    parametrized = getattr(module, "parametrizations", {})
    if "weight" in parametrized:
        own = {key: getattr(parametrized["weight"], key, None) for key in _PARAMETRIZED}
    return next((first_names[id(x)] for x in own.values() if x is not None and id(x) in first_names), None)


def _channel_dim(layer: Any) -> int:
    """Dim of the channels of what a layer reads and puts out, from the end: with or without examples in front."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)


class _Surveyor:
    """The call backs around every module: the stack, the boundaries, the facts of the layers."""

    def __init__(self, found: Survey, recorder: Recorder, stage: Stage, names: dict[int, str], training: bool) -> None:
        self.kinds = {name: _Kind.of(module) for name, module in stage.modules.items()}
        self.found, self.t, self.stage, self.names, self.training = found, recorder, stage, names, training
        self.inputs = {id(x) for x in stage.inputs}
        self.by_start: dict[int, LayerFacts] = {}
        self.made: dict[int, tuple[LayerFacts, Boundary]] = {}  # layers' outputs by id

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.t.stack.append((name, module))
        x = args[0] if args and isinstance(args[0], Tensor) else None
        self.t.entered.append(x)
        if x is not None and self.kinds[name].norm:
            self._reads(name, module, x)
        if x is not None and self.kinds[name].grouped and name not in self.found.gathering:
            return self._input(name, module, x), *args[1:]
        return None

    def _input(self, name: str, module: Any, x: Tensor) -> Tensor:
        """What a grouped convolution reads, under nodes of its own."""
        dim = _channel_dim(module)
        tag = self.t.table.info(x)
        outer = tag.labels[dim]
        if outer is None:
            outer = np.zeros(x.shape[dim], np.int64)
        with _disable_current_modes():
            own = x.detach()
        labels = list(tag.labels)
        labels[dim] = inner = self.t.constraints.new_labels(Auxiliary.BOUNDARY, len(outer))
        self.t.constraints.boundaries.append(Boundary(BoundaryKey(name, is_input=True), dim, inner, outer))
        self.t.table.set_labels(own, labels, tag.zero_dims, is_activation=tag.is_activation)
        if id(x) in self.t.readers:
            self.t.readers[id(x)].append(name)
        return own

    def _reads(self, name: str, module: nn.Module, x: Tensor) -> None:
        """A norm is the norm of the layer whose channels it reads, however many activations lie between."""
        labels = self.t.table.info(x).labels
        for dim in (1, -1) if x.ndim > 1 else (-1,):
            vector = labels[dim] if x.ndim else None
            facts = self.by_start.get(int(vector[0])) if vector is not None and len(vector) else None
            if facts is None or facts.num_filters != len(vector):  # type: ignore[arg-type]
                continue
            if facts.norm is None:
                facts.norm = name
            made = self.made.get(id(x))
            if made is not None and self.kinds[name].channel_norm:
                made[1].norm = name
            return

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        x = self.t.entered.pop()
        self.t.stack.pop()
        kind = self.kinds[name]
        if (kind.layer or kind.channel_norm) and isinstance(output, Tensor) and output.ndim:
            if kind.layer:
                self._layer(name, module, x, output)
            elif output.ndim > 1:
                self._boundary(name, output, 1)

    def _boundary(self, name: str, output: Tensor, dim: int) -> Boundary | None:
        tag = self.t.table.info(output)
        inner = tag.labels[dim]
        if inner is None:
            return None
        if name in self.found.expanded:
            # The scatter behind it is the cut: nothing that reads it sees these nodes.
            return Boundary(BoundaryKey(name), dim, inner, inner)
        boundary = Boundary(
            BoundaryKey(name), dim, inner, self.t.constraints.new_labels(Auxiliary.BOUNDARY, len(inner))
        )
        self.t.constraints.boundaries.append(boundary)
        labels = list(tag.labels)
        labels[dim] = boundary.outer
        tag.labels = labels
        return boundary

    def _layer(self, name: str, module: Any, x: Tensor | None, output: Tensor) -> None:
        facts = self.found.layers.get(name)
        weight = _weight_of(name, module, self.names) if facts is None else facts.weight
        if weight is None:
            return
        linear, transposed = isinstance(module, nn.Linear), isinstance(module, _ConvTransposeNd)
        dim = _channel_dim(module)
        if facts is None:
            depthwise = not linear and module.groups > 1 and module.groups == module.in_channels
            depthwise = depthwise and (not transposed or module.groups == module.out_channels)
            facts = LayerFacts(name, weight, output.shape[dim], not depthwise, grouped=self.kinds[name].grouped)
            self.found.layers[name] = facts
        rows = output if not transposed or x is None else x
        channels = module.in_channels if transposed else output.shape[dim]
        positions = rows.numel() // max(channels, 1) // self.stage.num_examples
        facts.positions[self.training] = facts.positions.get(self.training, 0) + positions
        facts.reads_input |= id(x) in self.inputs
        boundary = self._boundary(name, output, dim)
        if boundary is None:
            return
        facts.outputs = boundary.inner if facts.outputs is None else facts.outputs
        facts.boundaries.append(boundary)
        self.by_start[int(boundary.outer[0])] = facts
        self.made[id(output)] = (facts, boundary)
        self.t.readers[id(output)] = []

    def finish(self, output: Any) -> None:
        """The model's outputs stay as they are, and are read by somebody."""
        for leaf in iter_tensors(output):
            for dim, label in enumerate(self.t.table.info(leaf).labels):
                if label is not None:
                    self.t.constraints.freeze(label, "the model's output")
                    # channels that were folded into the examples are frozen, but no output of their layer
                    if dim or leaf.ndim == 1:
                        self.found.outputs.append(label)
            self.t.readers.get(id(leaf), []).append("")
        for key, (facts, boundary) in self.made.items():
            alone = boundary.norm if set(self.t.readers[key]) == {boundary.norm} else None
            known = self.found.expands_at_norm.setdefault(facts.name, alone)
            if known != alone:
                self.found.expands_at_norm[facts.name] = None


def survey(
    stage: Stage,
    choices: dict[ChoiceSite, int],
    frozen_calls: dict[tuple[bool, int], str],
    ends: dict[bool, tuple[int, str]],
) -> Survey:
    """Runs the forward in both modes under the recorder.

    Args:
        stage: The model and its inputs.
        choices: Place in the code to the choice to make there.
        frozen_calls: (training, number of the op), with the reason: everything that these ops and others at their places
            in the code see is frozen.
        ends: Per mode, (number of an op, reason): everything that this op and all behind it see is frozen.
    """
    tensors = stage.tensors
    first_names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    stand_ins = stage.stand_ins()
    names = {id(stand_ins[key]): name for key, name in first_names.items()}
    found = Survey(Constraints())
    found.expanded = {
        name: (int(vars(module)[EXPANSION.dim]), int(vars(module)[EXPANSION.width]))
        for name, module in stage.modules.items()
        if EXPANSION.positions in module._buffers
    }
    found.gathering = {name for name, module in stage.modules.items() if GATHER.positions in module._buffers}
    for training in (True, False):
        recorder = Recorder(
            found.constraints,
            RULES,
            (pointwise, unknown),
            names,
            stand_ins,
            stage.meta,
            stage.shapes,
            choices,
            bool(frozen_calls),
            ends[training][0] if training in ends else None,
        )
        for tensor in stage.inputs:
            recorder.table.set_labels(tensor, [None] * tensor.ndim, is_activation=True)
        weights = {**first_names, **names}
        surveyor = _Surveyor(found, recorder, stage, weights, training)
        with stage.set(stand_ins, training):
            try:
                output = stage.run(recorder, surveyor.enter, surveyor.leave)
            except Exception as error:
                found.torn[training] = error
            else:
                surveyor.finish(output)
        found.calls[training] = recorder.calls
        found.guessed |= recorder.guessed
        if training in found.torn:
            # a forward that broke off has coupled only half of what belongs together
            _freeze_all(found, recorder.calls, "the forward could not be followed to its end")
        if training in ends:
            number, why = ends[training]
            _freeze_all(found, recorder.calls[number:], why)
    _one_layer_a_norm(found)
    _freeze_places(found, frozen_calls)
    return found


def _freeze_places(found: Survey, frozen_calls: dict[tuple[bool, int], str]) -> None:
    """Repeated blocks share their places in the code, and what is hard-coded in one is so in all."""
    places = {found.calls[training][number].place: why for (training, number), why in frozen_calls.items()}
    for call in (call for calls in found.calls.values() for call in calls if places and call.place in places):
        for vector in call.nodes:
            found.constraints.freeze(vector, places[call.place])


def _freeze_all(found: Survey, calls: list[Call], why: str) -> None:
    for call in calls:
        for vector in call.nodes:
            found.constraints.freeze(vector, why)


def _one_layer_a_norm(found: Survey) -> None:
    """A norm that several layers share is no place to cut for one of them."""
    norms = [norm for norm in found.expands_at_norm.values() if norm is not None]
    for layer, norm in found.expands_at_norm.items():
        if norm is not None and norms.count(norm) > 1:
            found.expands_at_norm[layer] = None

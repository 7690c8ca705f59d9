"""Layers without a module of their own: weights that a module uses through a product or a convolution."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gflow_pl.channels.constraints import Labels, TensorDim
from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.record import LayerFacts, Record
from gflow_pl.channels.recorder import Recorder
from gflow_pl.channels.rules.operator_call import OperatorCall
from gflow_pl.values.expansion_names import plain_class

__all__ = ["PRODUCTS", "FunctionalLayers"]

PRODUCTS: dict[str, tuple[tuple[int, int], ...]] = {
    "mm": ((0, 0), (1, 1)),
    "addmm": ((1, 0), (2, 1)),
    "bmm": ((0, 1), (1, 2)),
    "baddbmm": ((1, 1), (2, 2)),
    "mv": ((0, 0),),
    "addmv": ((1, 0),),
    "convolution": ((1, 0),),
    "bilinear": ((2, 0),),
    "_trilinear": ((1, 0),),
    "_grouped_mm": ((1, -1),),
    "torchvision::deform_conv2d": ((1, 0),),
}
"""Operators that apply a weight: for each operand that may be the weight, its position among the arguments and the
dimension that counts filters. The first one of a convolution counts its inputs if it is transposed.
"""

_BIAS = {"addmm": 0, "addmv": 0, "convolution": 2, "torchvision::deform_conv2d": 4}
"""Position of the bias among the arguments."""

_MODULE_LAYERS = frozenset(
    [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
)
"""Types whose forward applies the weight of the module and no other."""

_OF_WEIGHT = ("weight", "weight_v", "weight_g", "weight_orig")
_PARAMETRIZED = "parametrizations"


class FunctionalLayers:
    """The layers of one recorded forward pass that are no calls of `nn.Linear` or of torch's convolutions.

    A parameter with at least two dimensions is the weight of such a layer if an operator multiplies it with something
    that depends on the network's input, and if one of its dimensions is a dimension of the result. The parameter may
    have been transposed, split, reshaped or scaled before. The layer is named after the module that holds the weight
    if this is its only parameter with two or more dimensions, otherwise after the weight.

    Args:
        record: The record to fill.
        recorder: The recorder of this pass. It calls `note` for all operators in `PRODUCTS`.
        runner: The model and its inputs.
        names: id of a parameter or buffer, or of its placeholder, to its name.
        training: Whether the pass is in training mode.
    """

    def __init__(
        self, record: Record, recorder: Recorder, runner: ForwardRunner, names: Mapping[int, str], training: bool
    ) -> None:
        self._record, self._recorder, self._runner, self._names = record, recorder, runner, names
        self._training = training
        self._inputs = {id(x) for x in runner.inputs}
        self._multiply_adds: dict[str, int] = {}
        self._weights_of: dict[str, frozenset[str]] = {}  # of a module layer that has run
        self._runs_in: dict[str, set[str]] = {}  # layer to the modules that were running
        self.of_label: dict[int, LayerFacts] = {}
        """First label of a layer's filters to the layer."""
        recorder.products, recorder.on_product = PRODUCTS, self.note

    def note(self, call: OperatorCall) -> None:
        """Add what one call of an operator shows about the layer whose weight it applies, if it applies one."""
        if plain_class(call.module) in _MODULE_LAYERS:
            return  # `LayerHooks` describes it
        is_activation = [call.info(x).is_activation for x in call.operands]
        if all(is_activation):
            return
        has_input = any(is_activation)
        for position, dim in PRODUCTS[call.name] if has_input else PRODUCTS[call.name][-1:]:
            weight = call.args[position]
            if call.info(weight).is_activation:
                continue
            if call.name == "convolution" and call.arg(6, "transposed", False):
                dim = 1
            source = self._filters(call.info(weight).labels[dim])
            if source is None or not (has_input or self._is_weight_of_parameter(call, source)):
                continue
            if not self._belongs_to_running_layer(source.tensor):
                self._note(call, weight, source)

    def _is_weight_of_parameter(self, call: OperatorCall, source: TensorDim) -> bool:
        """Return whether a product of two parameters applies the second one to the first one (learned queries, say).

        A bias tells it from a weight that is itself a product, and so does a weight whose filters are its rows.
        """
        return call.name == "convolution" or source.dim == 0 or self._bias_of(call) is not None

    def _bias_of(self, call: OperatorCall) -> str | None:
        """Return the name of the vector whose elements an operator adds to the filters of its weight."""
        place = _BIAS.get(call.name)
        bias = None if place is None or place >= len(call.args) else call.args[place]
        if not isinstance(bias, Tensor) or bias.ndim != 1:
            return None
        source = self._source(call.info(bias).labels[0])
        return None if source is None else source.tensor

    def _source(self, labels: Labels | None) -> TensorDim | None:
        """Return the parameter and its dimension that some labels count; None if they count something else."""
        if labels is None or not len(labels):
            return None
        constraints = self._record.constraints
        number = bisect_right(constraints.starts, int(labels[0])) - 1
        source = constraints.sources[number]
        if not isinstance(source, TensorDim) or not isinstance(self._runner.tensors[source.tensor], nn.Parameter):
            return None
        is_inside = constraints.starts[number] <= labels.min() and labels.max() < constraints.starts[number + 1]
        return source if is_inside else None

    def _filters(self, labels: Labels | None) -> TensorDim | None:
        """Return the parameter and its dimension whose positions are filters; None for a vector."""
        source = self._source(labels)
        return source if source is not None and self._runner.tensors[source.tensor].ndim > 1 else None

    def _belongs_to_running_layer(self, tensor: str) -> bool:
        """Return whether a running `nn.Linear` or convolution has this weight: `LayerHooks` describes it."""
        for name, module in reversed(self._recorder.module_stack):
            if isinstance(module, (_ConvNd, nn.Linear)):
                if name not in self._weights_of:
                    self._weights_of[name] = frozenset(_weights_of(module, self._names))
                return tensor in self._weights_of[name]
        return False

    def _note(self, call: OperatorCall, weight: Tensor, source: TensorDim) -> None:
        """Add one call to the facts about a layer.

        Args:
            call: The call.
            weight: The operand that is the weight.
            source: The parameter that it comes from, and the dimension that counts filters.
        """
        # The facts that do not change from call to call.
        name = self._name_of(source)
        facts = self._record.layers.get(name)
        parameter = self._runner.tensors[source.tensor]
        if facts is None:
            outputs = self._record.constraints.labels_of(source, parameter.shape[source.dim])
            if isinstance(self._runner.modules.get(name), _ConvNd) and call.arg(6, "transposed", False):
                outputs = np.tile(outputs, call.arg(8, "groups", 1))  # every group has these filters
            follows = call.name == "convolution" and call.arg(8, "groups", 1) > 1 == weight.shape[1]
            facts = LayerFacts(name, source.tensor, len(outputs), not follows, dim=source.dim, outputs=outputs)
            facts.is_functional = True
            self._record.layers[name] = facts
        facts.bias = facts.bias or self._bias_of(call)
        assert facts.outputs is not None
        self.of_label.setdefault(int(facts.outputs[0]), facts)
        running = {module_name for module_name, _ in self._recorder.module_stack}
        self._runs_in[name] = running & self._runs_in.get(name, running)

        # Its cost, as multiply-accumulates for an element of the whole weight.
        size = parameter.numel() * self._runner.num_examples
        before = self._multiply_adds.get(name, 0)
        self._multiply_adds[name] = after = before + _multiply_adds(call, weight)
        if self._counts(facts):
            added = after // size - before // size
            facts.positions[self._training] = facts.positions.get(self._training, 0) + added
        others = [x if x._base is None else x._base for x in call.operands if x is not weight]
        facts.reads_input |= any(id(x) in self._inputs for x in others)

    def _counts(self, facts: LayerFacts) -> bool:
        """Return whether a call adds to the cost: in the first call of the model that uses a weight, not in a copy."""
        first_call = facts.counted_call.setdefault(self._training, self._runner.call_number)
        is_copy = any(self._runner.modules.get(name) is not module for name, module in self._recorder.module_stack)
        return first_call == self._runner.call_number and not is_copy

    def _name_of(self, source: TensorDim) -> str:
        """Return the name of the layer that a dimension of a parameter counts the filters of."""
        tensor = source.tensor
        known = next((f.dim for f in self._record.layers.values() if f.weight == tensor), source.dim)
        owner_name, _, leaf = _owner_of(tensor)
        owner = self._runner.modules.get(owner_name)
        is_called = isinstance(owner, (_ConvNd, nn.Linear))
        if is_called:
            known = int(isinstance(owner, _ConvNd) and owner.transposed)
        if source.dim != known:
            return f"{tensor}.dim{source.dim}"
        if owner is None or not owner_name:
            return tensor
        if is_called:
            return owner_name if leaf in _OF_WEIGHT else tensor
        names = [name for name in self._runner.tensors if _is_weight_of(name, owner_name, self._runner)]
        weights = {_attribute(_owner_of(name)[2], owner) for name in names}
        return owner_name if len(weights) == 1 else tensor

    # -- behind a module ---------------------------------------------------------------------------------------------

    def layer_in(self, name: str, output: Tensor) -> tuple[LayerFacts, int] | None:
        """Return the layer whose filters are a dimension of the output of a module that has run it.

        The removed filters must be zero in that output, so that it can be scattered.

        Args:
            name: Name of the module.
            output: Its output.

        Returns:
            The layer and the dimension, counted from the end; None if there is none.
        """
        if not self.of_label:
            return None
        info = self._recorder.table.info(output)
        for dim in sorted(info.zero_dims, reverse=True):
            labels = info.labels[dim]
            facts = None if labels is None or not len(labels) else self.of_label.get(int(labels[0]))
            if facts is None or name not in self._runs_in.get(facts.name, ()) or facts.module not in (None, name):
                continue
            if labels is not None and facts.outputs is not None and np.array_equal(labels, facts.outputs):
                return facts, dim - output.ndim
        return None


def _multiply_adds(call: OperatorCall, weight: Tensor) -> int:
    """Return the multiply-accumulates of a call: every element of the result sums over what its filter holds."""
    if call.name == "convolution" and call.arg(6, "transposed", False):
        return call.operands[0].numel() * weight.shape[1:].numel()
    if call.name in ("convolution", "torchvision::deform_conv2d", "bilinear", "_trilinear"):
        return call.output.numel() * weight.shape[1:].numel()
    is_first = weight is call.args[0 if call.name in ("mm", "bmm", "mv") else 1]
    return call.output.numel() * weight.shape[-1 if is_first and call.name != "_grouped_mm" else -2]


def _owner_of(tensor: str) -> tuple[str, str, str]:
    """Return the module that a parameter belongs to, the name of the parameter there, and the name of the weight.

    A parameter of a parametrization belongs to the module that is parametrized.
    """
    parts = tensor.split(".")
    if _PARAMETRIZED in parts:
        place = parts.index(_PARAMETRIZED)
        return ".".join(parts[:place]), ".".join(parts[place:]), parts[place + 1]
    owner, _, leaf = tensor.rpartition(".")
    return owner, leaf, leaf


def _attribute(parameter: str, owner: nn.Module) -> str:
    """Return the attribute that a hook of `torch.nn.utils.weight_norm` or `spectral_norm` computes from a parameter.

    Any other parameter is the attribute itself.
    """
    for suffix, others in (("_v", ("_g",)), ("_g", ("_v",)), ("_orig", ())):
        name = parameter.removesuffix(suffix)
        if name != parameter and all(name + other in owner._parameters for other in others):
            return name
    return parameter


def _is_weight_of(tensor: str, owner: str, runner: ForwardRunner) -> bool:
    parameter = runner.tensors[tensor]
    return isinstance(parameter, nn.Parameter) and parameter.ndim > 1 and _owner_of(tensor)[0] == owner


def _weights_of(layer: nn.Module, names: Mapping[int, str]) -> list[str]:
    """Return the names of all tensors that the weight of a layer is computed from."""
    tensors = [layer._parameters.get(name) for name in _OF_WEIGHT]
    parametrized = getattr(layer, _PARAMETRIZED, {})
    if "weight" in parametrized:
        tensors += parametrized["weight"].parameters()
    return [names[id(x)] for x in tensors if x is not None and id(x) in names]

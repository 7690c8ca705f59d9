"""The layers that are scored, the norms that follow them, and the tensors that measures read of both."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gflow_pl.common.errors import SettingsError
from gflow_pl.values import ChannelGraph, Layer

__all__ = [
    "Reads",
    "ScoredLayer",
    "TensorRef",
    "WeightUse",
    "find_layers",
    "is_norm",
    "log_layers_without_norm",
    "recompute_weights",
    "source_parameters",
    "unique_refs",
    "weight_hooks",
]

log = logging.getLogger(__name__)

Reads = Literal["weight", "norm"]
"""Tensors that a measure reads: the weight of the layer, or weight and bias of the norm that follows it."""


@dataclass(frozen=True)
class TensorRef:
    """A tensor by its place: an attribute of a module.

    The tensor is read again at every use, because a parametrization computes a new one at every access.

    Attributes:
        owner: The module.
        attribute: Name of the attribute.
        name: Full name of the tensor, as in ``named_parameters()``.
    """

    owner: nn.Module
    attribute: str
    name: str

    @property
    def value(self) -> Tensor:
        """The tensor as the forward pass uses it."""
        return getattr(self.owner, self.attribute)

    def value_from(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return the value that the tensor has with other parameters and buffers of the model.

        A weight that a parametrization or a hook derives from other parameters is derived from the given ones.

        Args:
            tensors: Parameters and buffers by name. Missing buffers are those of the model.

        Returns:
            The value; None if a parameter is missing.
        """
        sources = source_parameters(self.owner, self.attribute)
        if self.name in tensors or not sources:
            return tensors.get(self.name)
        prefix = self.name.removesuffix(self.attribute)
        if any(prefix + name not in tensors for name in sources):
            return None
        sources += [name for name, _ in self.owner.named_buffers() if prefix + name in tensors]
        replaced = {f"owner.{name}": tensors[prefix + name] for name in sources}
        try:
            return torch.func.functional_call(_AttributeReader(self.owner, self.attribute), replaced, ())
        finally:
            recompute_weights(self.owner)


def source_parameters(owner: nn.Module, attribute: str) -> list[str]:
    """Return the names, inside a module, of the parameters that an attribute is derived from.

    The list is empty for a parameter, and not empty for a weight that a parametrization or a hook of
    `torch.nn.utils.weight_norm` or `spectral_norm` computes.
    """
    if parametrize.is_parametrized(owner, attribute):
        start = f"parametrizations.{attribute}."
    elif any(hook.name == attribute for hook in weight_hooks(owner)):
        start = f"{attribute}_"
    else:
        return []
    return [name for name, _ in owner.named_parameters() if name.startswith(start)]


def weight_hooks(module: nn.Module) -> list[WeightNorm | SpectralNorm]:
    """Return the hooks of `torch.nn.utils.weight_norm` and `spectral_norm` that compute a weight of a module.

    Parametrizations, which replace these hooks in current PyTorch, are not included.
    """
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm))]


@torch.no_grad()
def recompute_weights(module: nn.Module) -> None:
    """Recompute the weights that hooks derive from parameters.

    Such a weight is otherwise that of the last forward pass, not that of the current parameters. The module must be in
    evaluation mode, in which a spectral norm updates no buffer.
    """
    for hook in weight_hooks(module):
        hook(module, ())


class _AttributeReader(nn.Module):
    """A module whose forward returns an attribute of another module, for `torch.func.functional_call`."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        super().__init__()
        self.owner, self.attribute = owner, attribute

    def forward(self) -> Tensor:
        recompute_weights(self.owner)
        return getattr(self.owner, self.attribute)


@dataclass(frozen=True)
class WeightUse:
    """How a module uses a weight itself, without a call of `nn.Linear` or of a convolution of torch.

    Attributes:
        module_name: Name of the module that holds the weight.
        weight: Name of the weight in the module.
        bias: Name of the bias in the module, if it is known.
        dim: Dimension of the weight that counts filters.
        output: Name of the module whose output holds the filters, and the dimension of that output, counted from the
            end; None if no module returns them.
    """

    module_name: str
    weight: str
    bias: str | None
    dim: int
    output: tuple[str, int] | None


@dataclass(frozen=True)
class ScoredLayer:
    """A convolution, transposed convolution or linear layer, and the norm that follows it.

    Attributes:
        name: Name of the layer.
        module: The layer, or the module that holds the weight and uses it itself.
        norm: The norm that follows it, if any.
        norm_name: Name of that norm.
        first_names: Name of every parameter to the first of its names, as in ``named_parameters()``; the two differ for
            tied parameters.
        use: How the module uses the weight; None for a convolution or linear layer of torch.
    """

    name: str
    module: nn.Module
    norm: nn.Module | None
    norm_name: str | None
    first_names: Mapping[str, str] = field(default_factory=dict, repr=False)
    use: WeightUse | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as the forward pass uses it."""
        weight = getattr(self.module, "weight" if self.use is None else self.use.weight)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def module_name(self) -> str:
        """Name of `module`."""
        return self.name if self.use is None else self.use.module_name

    @property
    def num_filters(self) -> int:
        """Number of output channels."""
        weight = self.weight
        if self.use is not None:
            return weight.shape[self.use.dim]
        return weight.shape[1] * self.module.groups if isinstance(self.module, _ConvTransposeNd) else weight.shape[0]

    def tensors(self, reads: Reads) -> list[TensorRef]:
        """Return the tensors that a measure reads.

        A layer without a norm is treated as if a norm of weight 1 and bias 0 followed. The gradients of these two
        follow from those of the layer's own weight and bias, which are returned then.
        """
        own = ("weight", "bias") if self.use is None else (self.use.weight, self.use.bias)
        if reads == "weight":
            return [self._ref(self.module, self.module_name, own[0])]
        owner, name, attributes = self.module, self.module_name, [attribute for attribute in own if attribute]
        if self.norm is not None:
            owner, name, attributes = self.norm, self.norm_name or "", ["weight", "bias"]
        attributes = [attribute for attribute in attributes if getattr(owner, attribute, None) is not None]
        return [self._ref(owner, name, attribute) for attribute in attributes]

    def _ref(self, owner: nn.Module, owner_name: str, attribute: str) -> TensorRef:
        name = f"{owner_name}.{attribute}" if owner_name else attribute
        return TensorRef(owner, attribute, self.first_names.get(name, name))


def find_layers(model: nn.Module, graph: ChannelGraph | None = None) -> list[ScoredLayer]:
    """Return every convolution, transposed convolution and linear layer, in the order of ``named_modules()``.

    Weights that modules use themselves come behind these, in the order of the graph.

    Args:
        model: Any module; it is not changed.
        graph: Graph that names the norm behind each layer, and the weights that modules use themselves. Without a
            graph, and for layers that the graph does not contain, the norm is the next one of the layer's width that is
            registered in the same parent module.

    Raises:
        SettingsError: The model has no such layer, or a lazy one that is not initialized.
    """
    layers = []
    modules = dict(model.named_modules())
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    first_names = {name: by_id[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    for name, module in modules.items():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        if isinstance(module.weight, UninitializedParameter):
            raise SettingsError(f"Layer '{name}' is lazy and has no weight yet: run one batch through the model first.")
        norm_name = _name_of_norm(modules, ScoredLayer(name, module, None, None), graph)
        norm = modules[norm_name] if norm_name is not None else None
        layers.append(ScoredLayer(name, module, norm, norm_name, first_names))
    found = {layer.name for layer in layers}
    for name, layer in graph.layers.items() if graph is not None else ():
        if name not in found and layer.is_functional:
            layers.append(_layer_of_weight(modules, layer, graph, first_names))
    if not layers:
        raise SettingsError(f"{type(model).__name__} has no conv, transposed conv or linear layer: nothing to score.")
    return layers


def _layer_of_weight(
    modules: Mapping[str, nn.Module], layer: Layer, graph: ChannelGraph | None, first_names: Mapping[str, str]
) -> ScoredLayer:
    """Return the layer whose weight a module uses itself.

    Args:
        modules: Modules of the network by name.
        layer: The graph's description of the layer.
        graph: The graph.
        first_names: See `ScoredLayer`.
    """
    # The weight, or the attribute that a parametrization or a hook computes from it.
    owner_name, _, weight = layer.weight.rpartition(".")
    if ".parametrizations." in f".{layer.weight}":
        owner_name, _, inner = f".{layer.weight}".partition(".parametrizations.")
        owner_name, weight = owner_name.removeprefix("."), inner.partition(".")[0]
    owner = modules[owner_name]
    weight = next((hook.name for hook in weight_hooks(owner) if weight.startswith(f"{hook.name}_")), weight)

    # The bias: the one that the trace has seen, or the one that is named like the weight.
    bias = None if layer.bias is None else layer.bias.removeprefix(f"{owner_name}." if owner_name else "")
    use = WeightUse(owner_name, weight, bias, layer.dim, None)
    if layer.module is not None and layer.output_dim is not None:
        use = replace(use, output=(layer.module, layer.output_dim))
    if bias is None or not isinstance(getattr(owner, bias, None), Tensor):
        likely = weight.replace("weight", "bias")
        vector = getattr(owner, likely, None) if likely != weight else None
        fits = isinstance(vector, Tensor) and vector.shape == (layer.num_filters,)
        use = replace(use, bias=likely if fits else None)
    plain = ScoredLayer(layer.name, owner, None, None, first_names, use)
    norm_name = _name_of_norm(modules, plain, graph)
    return replace(plain, norm=None if norm_name is None else modules[norm_name], norm_name=norm_name)


def _name_of_norm(modules: Mapping[str, nn.Module], layer: ScoredLayer, graph: ChannelGraph | None) -> str | None:
    """Return the name of the norm with a weight that follows a layer, or None if there is none.

    The graph tells which one it is. For a layer that is not in the graph, it is the next norm of the same width that
    was registered in the same parent module.
    """
    if graph is not None and layer.name in graph.layers:
        norm = graph.layers[layer.name].norm
        if norm is None or norm not in modules or getattr(modules[norm], "weight", None) is None:
            return None
        return norm
    if not layer.name:
        return None
    parent_name, _, own_name = layer.name.rpartition(".")
    siblings = list(modules[parent_name].named_children())
    place = next(i for i, (name, _) in enumerate(siblings) if name == own_name)
    for name, sibling in siblings[place + 1 :]:
        if is_norm(sibling) and _has_vector_weight(sibling) and _weight(sibling).numel() == layer.num_filters:
            return f"{parent_name}.{name}" if parent_name else name
    return None


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm: one of PyTorch's, or of a class with "Norm" in its name."""
    known = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(module, known) or "Norm" in type(module).__name__


def _has_vector_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor) and _weight(module).ndim == 1


def unique_refs(layers: list[ScoredLayer], reads: Reads) -> list[TensorRef]:
    """Return the tensors that a measure reads of all layers; a tied tensor appears once."""
    return list({ref.name: ref for layer in layers for ref in layer.tensors(reads)}.values())


def log_layers_without_norm(layers: list[ScoredLayer], reads: Reads, measure: str) -> None:
    """Log which layers have no norm, if the measure reads norms."""
    without = [layer.name for layer in layers if layer.norm is None]
    if reads == "norm" and without:
        log.info(
            "Measure '%s': %d layers have no norm (%s); they are scored as if a norm of weight 1 and bias 0 followed.",
            measure,
            len(without),
            ", ".join(without[:3]) + (", ..." if len(without) > 3 else ""),
        )


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight

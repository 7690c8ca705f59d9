"""Which tensors a filter is made of: layers, the norms behind them, and their tensors as rows, a row a filter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gflow_pl.values import ChannelGraph

__all__ = [
    "Reads",
    "ScoredLayer",
    "TensorRef",
    "computed_from",
    "computing_hooks",
    "find_layers",
    "gradient_rows",
    "recompute_weights",
    "unique_refs",
    "weight_rows",
]

log = logging.getLogger(__name__)

Reads = Literal["weight", "norm"]


@dataclass(frozen=True)
class TensorRef:
    """A tensor by its place: an attribute of a module. Read anew each time, for a parametrization computes it."""

    owner: nn.Module
    attribute: str
    name: str

    @property
    def value(self) -> Tensor:
        """The tensor as the forward pass uses it."""
        return getattr(self.owner, self.attribute)

    def value_by(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The tensor as it would be by other parameters and buffers of the model; None where these do not say it.

        A parametrization, or a hook, computes it anew from its own; buffers that are not given are those of the model.
        """
        parts = computed_from(self.owner, self.attribute)
        if self.name in tensors or not parts:
            return tensors.get(self.name)
        prefix = self.name.removesuffix(self.attribute)
        if any(prefix + name not in tensors for name in parts):
            return None
        parts += [name for name, _ in self.owner.named_buffers() if prefix + name in tensors]
        own = {f"owner.{name}": tensors[prefix + name] for name in parts}
        try:
            return torch.func.functional_call(_Reading(self.owner, self.attribute), own, ())
        finally:
            recompute_weights(self.owner)


def computed_from(owner: nn.Module, attribute: str) -> list[str]:
    """The parameters, by their names in a module, that a parametrization or a hook computes an attribute from.

    None for a parameter.
    """
    if parametrize.is_parametrized(owner, attribute):
        start = f"parametrizations.{attribute}."
    elif any(hook.name == attribute for hook in computing_hooks(owner)):
        start = f"{attribute}_"
    else:
        return []
    return [name for name, _ in owner.named_parameters() if name.startswith(start)]


def computing_hooks(module: nn.Module) -> list[WeightNorm | SpectralNorm]:
    """What `torch.nn.utils.weight_norm` and `spectral_norm`, those before parametrizations, compute a weight by."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm))]


@torch.no_grad()
def recompute_weights(module: nn.Module) -> None:
    """Make a weight that a hook computes that of the parameters as they are: until now it was of the last forward pass.

    In evaluation mode, where the hook of a spectral norm moves nothing.
    """
    for hook in computing_hooks(module):
        hook(module, ())


class _Reading(nn.Module):
    """Reads an attribute of a module as its forward, so that other tensors can be lent to it."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        super().__init__()
        self.owner, self.attribute = owner, attribute

    def forward(self) -> Tensor:
        recompute_weights(self.owner)
        return getattr(self.owner, self.attribute)


@dataclass(frozen=True)
class ScoredLayer:
    """A conv, transposed conv or linear layer, and the norm behind it.

    A tied tensor goes by its first owner's name, as in ``named_parameters()``: `first_names` knows it.
    """

    name: str
    module: nn.Module
    norm: nn.Module | None
    norm_name: str | None
    first_names: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def num_filters(self) -> int:
        """Output channels at present."""
        weight = _weight(self.module)
        return weight.shape[1] * self.module.groups if isinstance(self.module, _ConvTransposeNd) else weight.shape[0]

    def tensors(self, reads: Reads) -> list[TensorRef]:
        """The tensors that a measure of this kind looks at.

        A layer without norm is seen as if a norm of weight 1 and bias 0 followed; the gradients of these two
        follow from the layer's own weight and bias, which are returned then.
        """
        if reads == "weight":
            return [self._ref(self.module, self.name, "weight")]
        owner, name = (self.module, self.name) if self.norm is None else (self.norm, self.norm_name)
        attributes = [attribute for attribute in ("weight", "bias") if getattr(owner, attribute, None) is not None]
        return [self._ref(owner, name, attribute) for attribute in attributes]

    def _ref(self, owner: nn.Module, owner_name: str | None, attribute: str) -> TensorRef:
        name = f"{owner_name}.{attribute}" if owner_name else attribute
        return TensorRef(owner, attribute, self.first_names.get(name, name))


def find_layers(model: nn.Module, graph: ChannelGraph | None = None) -> list[ScoredLayer]:
    """Every conv, transposed conv and linear layer of a model, in the order of ``named_modules()``.

    Args:
        model: Any module; nothing is changed.
        graph: A `ChannelGraph`, which knows the norm that reads a layer's output. Without one (or for layers that it
            does not know) a layer's norm is the next one registered in the same parent with its width.

    Raises:
        ValueError: There is no such layer, or a lazy one is not initialised yet.
    """
    layers = []
    modules = dict(model.named_modules())
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    first_names = {name: by_id[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    for name, module in modules.items():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        if isinstance(module.weight, UninitializedParameter):
            raise ValueError(f"Layer '{name}' is lazy and has no weight yet: run one batch through the model first.")
        norm_name = _norm_behind(modules, ScoredLayer(name, module, None, None), graph)
        norm = modules[norm_name] if norm_name is not None else None
        layers.append(ScoredLayer(name, module, norm, norm_name, first_names))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no conv, transposed conv or linear layer: nothing to score.")
    return layers


def _norm_behind(modules: Mapping[str, nn.Module], layer: ScoredLayer, graph: ChannelGraph | None) -> str | None:
    if graph is not None and layer.name in graph.layers:
        norm = graph.layers[layer.name].norm
        return (
            norm
            if norm is not None and norm in modules and getattr(modules[norm], "weight", None) is not None
            else None
        )
    parent_name, _, own = layer.name.rpartition(".")
    if not layer.name:
        return None
    siblings = list(modules[parent_name].named_children())
    place = next(i for i, (name, _) in enumerate(siblings) if name == own)
    for name, sibling in siblings[place + 1 :]:
        if _is_norm(sibling) and _weight(sibling).numel() == layer.num_filters:
            return f"{parent_name}.{name}" if parent_name else name
    return None


def _is_norm(module: nn.Module) -> bool:
    known = isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)) or "Norm" in type(module).__name__
    return known and isinstance(getattr(module, "weight", None), Tensor) and _weight(module).ndim == 1


def _filter_rows(layer: ScoredLayer, weight: Tensor) -> Tensor:
    """(filters, weights of one filter); of a transposed conv the outputs stand in dim 1, group by group."""
    if not isinstance(layer.module, _ConvTransposeNd):
        return weight.flatten(1)
    groups = layer.module.groups
    inputs, outputs, *kernel = weight.shape
    size = inputs // groups * torch.Size(kernel).numel()
    return weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2).reshape(groups * outputs, size)


def weight_rows(layer: ScoredLayer, reads: Reads, values: Mapping[str, Tensor]) -> Tensor:
    """The values of a layer's tensors, (filters, values of one filter).

    Args:
        layer: The layer.
        reads: "weight", or "norm" for the norm's weight and bias (1 and 0 where there is none).
        values: Tensors by the names that ``layer.tensors(reads)`` gives.
    """
    found = [values[ref.name] for ref in layer.tensors(reads)]
    if reads == "weight":
        return _filter_rows(layer, found[0])
    if layer.norm is None:
        ones = found[0].new_ones(layer.num_filters)
        return torch.stack([ones, torch.zeros_like(ones)], dim=1)
    return torch.stack(found, dim=1)


def gradient_rows(
    layer: ScoredLayer, reads: Reads, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> Tensor:
    """Anything linear in the gradients, in the rows of `weight_rows`.

    A norm that is not there would scale and shift the layer's outputs: its weight, at 1, has the gradient
    sum(w g) + b g_b; its bias, at 0, the gradient g_b.
    """
    refs = layer.tensors(reads)
    found = [gradients[ref.name] for ref in refs]
    if reads == "weight":
        return _filter_rows(layer, found[0])
    if layer.norm is not None:
        return torch.stack(found, dim=1)
    scale = (_filter_rows(layer, values[refs[0].name]) * _filter_rows(layer, found[0])).sum(1)
    shift = found[1] if len(found) > 1 else torch.zeros_like(scale)
    if len(found) > 1:
        scale = scale + values[refs[1].name] * shift
    return torch.stack([scale, shift], dim=1)


def say_what_stands_in(layers: list[ScoredLayer], reads: Reads, measure: str) -> None:
    """Log how a measure of norms treats the layers that have none."""
    without = [layer.name for layer in layers if layer.norm is None]
    if reads == "norm" and without:
        log.info(
            "Measure '%s': %d layers have no norm (%s); they are scored as if a norm of weight 1 and bias 0 followed.",
            measure, len(without), ", ".join(without[:3]) + (", ..." if len(without) > 3 else ""),
        )  # fmt: skip


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def unique_refs(layers: list[ScoredLayer], reads: Reads) -> list[TensorRef]:
    """The tensors of all layers, each once."""
    return list({ref.name: ref for layer in layers for ref in layer.tensors(reads)}.values())

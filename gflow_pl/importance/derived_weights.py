"""Gradients of derived weights, collected while a model trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from gflow_pl.importance.layers import source_parameters
from gflow_pl.importance.reduction import Reduce
from gflow_pl.importance.scoring_mode import scoring_mode

__all__ = ["DerivedWeightGradients"]


class DerivedWeightGradients:
    """Gradients of the weights that a parametrization or a hook derives from other parameters.

    `backward` stores a gradient for parameters only. Therefore a tensor of zeros that requires a gradient is added to
    each derived weight where it is computed. The ``.grad`` of these zeros is the gradient of the weight, summed over
    all its uses and over all batches of a step, like the gradient of a parameter. It is wrong only if gradients are
    discarded without a step.

    Args:
        module: Module that trains.
        names: Names of the tensors whose gradients are needed. Parameters among them are ignored.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self._owners: dict[str, nn.Module] = {}
        self._sources: dict[str, list[nn.Parameter]] = {}
        self._zeros: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        with scoring_mode(module):  # in training mode, reading the weight of a spectral norm would update its buffers
            for name in names:
                owner = module.get_submodule(_owner_name(name))
                if sources := source_parameters(owner, _attribute(name)):
                    self._owners[name] = owner
                    self._sources[name] = [owner.get_parameter(source) for source in sources]
                    self._zeros[name] = torch.zeros_like(getattr(owner, _attribute(name)), requires_grad=True)

    def start(self) -> None:
        """Register the hooks that add the zeros."""
        for name, owner in self._owners.items():
            if parametrize.is_parametrized(owner, _attribute(name)):
                parametrization = owner.get_submodule(f"parametrizations.{_attribute(name)}")
                self._handles.append(parametrization.register_forward_hook(self._parametrization_hook(name)))
            else:
                self._handles.append(owner.register_forward_pre_hook(self._layer_hook(name)))

    def stop(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def collect(self, parameters: set[int], reduce: Reduce | None) -> dict[str, Tensor]:
        """Return the gradients since the last call, averaged over the ranks, and reset them.

        Args:
            parameters: ``id`` of the parameters of one optimizer. The weights derived from others are left out.
            reduce: Averages a tensor over the ranks; None for a single process.

        Returns:
            Gradients by name, of the weights that at least one rank has used.
        """
        found: dict[str, Tensor | None] = {}
        for name, sources in self._sources.items():
            if any(id(source) in parameters and source.grad is not None for source in sources):
                found[name], self._zeros[name].grad = self._zeros[name].grad, None
        if reduce is None or not found:
            return {name: gradient for name, gradient in found.items() if gradient is not None}
        # All ranks must send the same messages, also a rank whose batch does not use a weight.
        device = self._zeros[next(iter(found))].device
        shares = reduce(torch.tensor([float(g is not None) for g in found.values()], device=device)).tolist()
        return {
            name: reduce(torch.zeros_like(self._zeros[name]) if gradient is None else gradient)
            for (name, gradient), share in zip(found.items(), shares, strict=True)
            if share > 0
        }

    def _plus_zeros(self, name: str, weight: Tensor) -> Tensor:
        # A compiled graph would contain the addition for good.
        if not weight.requires_grad or torch.compiler.is_compiling():
            return weight
        return weight + self._zeros[name].to(weight.dtype)

    def _parametrization_hook(self, name: str) -> Callable[..., Tensor]:
        return lambda _module, _inputs, weight: self._plus_zeros(name, weight)

    def _layer_hook(self, name: str) -> Callable[..., None]:
        attribute = _attribute(name)
        return lambda owner, _inputs: setattr(owner, attribute, self._plus_zeros(name, getattr(owner, attribute)))


def _owner_name(name: str) -> str:
    return name.rpartition(".")[0]


def _attribute(name: str) -> str:
    return name.rpartition(".")[2]

"""The gradients of weights that are computed from others, taken while a model trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from gflow_pl.importance.layers import computed_from
from gflow_pl.importance.reduction import Reduce
from gflow_pl.importance.scoring_mode import scoring_mode

__all__ = ["DerivedWeightGradients"]


class DerivedWeightGradients:
    """The gradients of weights that parametrizations (or the hooks before them) compute: `backward` leaves them nowhere.

    To each such weight a zero is added where it is computed. What `backward` leaves in the zero's ``.grad`` is the gradient
    of the weight: over all its uses and over all batches of a step, as of any parameter. It is only wrong where gradients
    are thrown away without a step.

    Args:
        module: The module.
        names: Tensors whose gradients are wanted, parameters among them.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self._owners: dict[str, nn.Module] = {}
        self._parts: dict[str, list[nn.Parameter]] = {}
        self._zeros: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        with scoring_mode(module):  # to look at a spectral norm's weight moves it in training
            for name in names:
                owner = module.get_submodule(_owner_name(name))
                if parts := computed_from(owner, _attribute(name)):
                    self._owners[name] = owner
                    self._parts[name] = [owner.get_parameter(part) for part in parts]
                    self._zeros[name] = torch.zeros_like(getattr(owner, _attribute(name)), requires_grad=True)

    def start(self) -> None:
        """Adds the zeros from now on."""
        for name, owner in self._owners.items():
            if parametrize.is_parametrized(owner, _attribute(name)):
                parametrization = owner.get_submodule(f"parametrizations.{_attribute(name)}")
                self._handles.append(parametrization.register_forward_hook(self._after_parametrization(name)))
            else:
                self._handles.append(owner.register_forward_pre_hook(self._after_hook(name)))

    def stop(self) -> None:
        """Adds them no longer."""
        while self._handles:
            self._handles.pop().remove()

    def collect(self, parameters: set[int], reduce: Reduce | None) -> dict[str, Tensor]:
        """The gradients since the last time, averaged over the ranks, of the weights computed from these parameters (ids)."""
        found = {}
        for name, parts in self._parts.items():
            if any(id(part) in parameters and part.grad is not None for part in parts):
                found[name], self._zeros[name].grad = self._zeros[name].grad, None
        if reduce is None or not found:
            return {name: gradient for name, gradient in found.items() if gradient is not None}
        # A rank whose batch does not use a weight takes part all the same.
        device = self._zeros[next(iter(found))].device
        users = reduce(torch.tensor([float(g is not None) for g in found.values()], device=device)).tolist()
        return {
            name: reduce(torch.zeros_like(self._zeros[name]) if gradient is None else gradient)
            for (name, gradient), share in zip(found.items(), users, strict=True)
            if share > 0
        }

    def _plus_zero(self, name: str, weight: Tensor) -> Tensor:
        # What is compiled now would go on adding it for ever.
        if not weight.requires_grad or torch.compiler.is_compiling():
            return weight
        return weight + self._zeros[name].to(weight.dtype)

    def _after_parametrization(self, name: str) -> Callable[..., Tensor]:
        return lambda _module, _inputs, weight: self._plus_zero(name, weight)

    def _after_hook(self, name: str) -> Callable[..., None]:
        attribute = _attribute(name)
        return lambda owner, _inputs: setattr(owner, attribute, self._plus_zero(name, getattr(owner, attribute)))


def _owner_name(name: str) -> str:
    return name.rpartition(".")[0]


def _attribute(name: str) -> str:
    return name.rpartition(".")[2]

"""Copies of weights that are no submodules: dicts and lists of tensors, and modules that are not registered."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TensorCopies", "find_tensor_copies", "grafted"]


class TensorCopies(MutableMapping[str, Tensor]):
    """Tensors by the names of the parameters that they copy; a tensor that is set changes its data and stays itself.

    Args:
        tensors: The tensors by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._tensors[name].data = value.detach()

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def find_tensor_copies(
    module: nn.Module, containers: Mapping[str, Any], known: Mapping[str, str]
) -> list[TensorCopies]:
    """Return the dicts and lists among some containers that hold one tensor for each of some parameters.

    The keys of a dict have to be names of parameters or buffers, relative to the module or to one of its submodules,
    and all shapes have to be equal. The tensors of a list have to have the shapes of a submodule's parameters, in
    order. If several submodules fit, the one with the nearest values is taken.

    Args:
        module: The module.
        containers: The containers.
        known: Copies among the submodules, which are not searched.
    """
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    named = {name: x for name, x in named.items() if not any(name.startswith(f"{copied}.") for copied in known)}
    found = []
    for container in containers.values():
        if isinstance(container, dict):
            choices = list(_by_key(container, named))
        else:
            choices = list(_by_order(list(container), module, named))
        if choices:
            found.append(TensorCopies(min(choices, key=lambda choice: _distance(choice, named))))
    return found


def _by_key(container: dict[Any, Any], named: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    tensors = {key: value for key, value in container.items() if isinstance(value, Tensor) and isinstance(key, str)}
    if not tensors or not any(value.ndim > 1 for value in tensors.values()):
        return
    first = next(iter(tensors))
    for name in named:
        if name == first or name.endswith(f".{first}"):
            prefix = name[: len(name) - len(first)]
            if all(prefix + key in named and named[prefix + key].shape == x.shape for key, x in tensors.items()):
                choice = {prefix + key: value for key, value in tensors.items()}
                if len(choice) > 1 or _distance(choice, named) == 0:
                    yield choice


def _by_order(container: list[Any], module: nn.Module, named: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    if len(container) < 2 or not all(isinstance(value, Tensor) for value in container):
        return
    shapes = [value.shape for value in container]
    if not any(len(shape) > 1 for shape in shapes):
        return
    for prefix, part in module.named_modules():
        own = [(f"{prefix}.{name}" if prefix else name, p) for name, p in part.named_parameters()]
        buffers = [(f"{prefix}.{name}" if prefix else name, p) for name, p in part.named_buffers()]
        for chosen in (own, [pair for pair in own if pair[1].requires_grad], [*own, *buffers]):
            if [p.shape for _, p in chosen] == shapes and all(name in named for name, _ in chosen):
                yield {name: value for (name, _), value in zip(chosen, container, strict=True)}
                break


def _distance(choice: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        squares = [
            (x.detach().double() - named[name].detach().to(x.device).double()).square().sum().cpu()
            for name, x in choice.items()
        ]
    return float(torch.stack(squares).sum())


def grafted(module: nn.Module, part: nn.Module, name: str) -> nn.Module:
    """Return a shallow copy of a module in which another module is in the place of a submodule.

    Everything else is shared with the module, which is not changed.

    Args:
        module: The module.
        part: The module to put in.
        name: Name of the submodule that it replaces; "" for the whole module.
    """
    if not name:
        return part
    first, _, rest = name.partition(".")
    duplicate = copy.copy(module)
    vars(duplicate)["_modules"] = dict(module._modules)
    child = module._modules[first]
    assert child is not None
    duplicate._modules[first] = grafted(child, part, rest)
    return duplicate

"""A network of two convolutions, and the slicing of its tensors and optimizer state by hand."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def two_convs(a: int = 8, b: int = 6) -> nn.Sequential:
    """Return two convolutions with norms (`a` and `b` filters), and a linear layer with 4 outputs."""
    return nn.Sequential(
        nn.Conv2d(3, a, 3),
        nn.BatchNorm2d(a),
        nn.ReLU(),
        nn.Conv2d(a, b, 3),
        nn.BatchNorm2d(b),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(b, 4),
    )


def slice_tensor(name: str, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Slice a parameter or buffer of `two_convs`, or a tensor of the optimizer state that belongs to it.

    Args:
        name: Name of the parameter or buffer.
        value: The tensor; a scalar is copied whole.
        first: Positions of the filters that the first convolution keeps.
        second: Positions of the filters that the second convolution keeps.
    """
    first, second = first.to(value.device), second.to(value.device)
    if value.ndim == 0:
        return value.clone()
    if name.startswith(("0.", "1.")):
        return value[first].clone()
    if name == "3.weight":
        return value[second][:, first].clone()
    if name == "8.weight":
        return value[:, second].clone()
    return value.clone() if name == "8.bias" else value[second].clone()


def sliced_optimizer(
    optimizer: torch.optim.Optimizer,
    small: nn.Module,
    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    first: Tensor,
    second: Tensor,
) -> torch.optim.Optimizer:
    """Return a new optimizer of the small network, with the old optimizer's state sliced by hand."""
    names = [name for name, _ in small.named_parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    for position, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                entries[key] = slice_tensor(names[position], value, first, second)
    fresh = make(small.parameters())
    fresh.load_state_dict(state)
    return fresh

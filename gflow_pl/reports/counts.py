"""What a network costs: multiply-accumulates, parameters and bytes, without data and without touching it."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from gflow_pl.common.attention import attention_fast_path_disabled

__all__ = ["Counts", "count_network", "state_bytes"]


@dataclass(frozen=True)
class Counts:
    """The cost of one forward pass in evaluation mode, and the size of the network.

    Attributes:
        macs: Multiply-accumulates of convolutions, linear layers and other matrix products (attention's among them):
            one fused multiply-add counts once; bias, norms, activations, pooling and additions are not counted.
        parameters: Elements of all parameters, trained or not; buffers are not counted.
        layers: Module name to its own multiply-accumulates, in the order of the first call; see `by_layer`.
        not_counted: Operator name to the number of its calls that added nothing to `macs`; views are left out.
    """

    macs: int
    parameters: int
    layers: Mapping[str, int] = field(default_factory=dict)
    not_counted: Mapping[str, int] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Floating point operations: 2 x `macs`, a multiplication and an addition each."""
        return 2 * self.macs

    def by_layer(self) -> dict[str, int]:
        """Multiply-accumulates by module, those of its children left out; modules that add none are left out too."""
        return {name: macs for name, macs in self.layers.items() if macs}


def count_network(model: nn.Module, example: Any) -> Counts:
    """Count a network by running a copy of it on tensors that have shapes and no data.

    Nothing is computed and `model` is left as it is. A network that asks for the value of a tensor is run once on
    a copy on the CPU instead.

    Args:
        model: Any module, pruned or not; it is counted in evaluation mode.
        example: An input of it: a tuple is the positional arguments, anything else the only argument. The counts are
            for this input as a whole: for one image, give a batch of one.

    Example:
        >>> counts = count_network(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), torch.zeros(1, 3, 32, 32))
        >>> counts.macs, counts.flops, counts.parameters, counts.by_layer()
        (221184, 442368, 224, {'0': 221184})
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    arguments = example if isinstance(example, tuple) else (example,)
    try:
        layers, not_counted = _run(_meta_copy(model), _cast(arguments, model, "meta"))
    except (NotImplementedError, RuntimeError):
        # No formula for shapes alone, or a choice that depends on a value: real numbers answer, or fail.
        layers, not_counted = _run(copy.deepcopy(model).cpu(), _cast(arguments, model, "cpu"))
    return Counts(sum(layers.values()), parameters, layers, dict(not_counted))


def state_bytes(state_dict: Mapping[str, Any]) -> int:
    """Bytes of the saved state dict alone, as ``torch.save`` writes it; a tensor under two names is saved once.

    The ratio of two of them, unpruned over pruned, is the compression.
    """
    compact: dict[tuple[Any, ...], Tensor] = {}

    def alone(tensor: Tensor) -> Tensor:
        # A view would be saved with all of the storage that it looks into.
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in compact or not tensor.numel():
            compact[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return compact[key]

    file = io.BytesIO()
    torch.save({name: alone(v) if isinstance(v, Tensor) else v for name, v in state_dict.items()}, file)
    return file.getbuffer().nbytes


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes and no data; the data is never copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    # A LightningModule holds its Trainer, and through it data loaders and optimizers.
    try:
        trainer = getattr(model, "trainer", None)
    except RuntimeError:  # raised by Lightning where no Trainer is attached
        trainer = None
    if trainer is not None and not isinstance(trainer, nn.Module):
        memo[id(trainer)] = None
    return copy.deepcopy(model, memo)


def _cast(arguments: tuple[Any, ...], model: nn.Module, device: str) -> tuple[Any, ...]:
    """The arguments on that device, floating point ones in the type of the network's parameters."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), None)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype if tensor.dtype.is_floating_point else None)

    return tree_map_only(Tensor, cast, arguments)


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[dict[str, int], Counter[str]]:
    """Own multiply-accumulates of every module, and the operators without any; `model` is a copy to spoil."""
    counter = FlopCounterMode(display=False)
    own: dict[str, int] = {}
    open_calls: list[list[int]] = []

    def enter(name: str, *_: Any) -> None:
        own.setdefault(name, 0)
        open_calls.append([counter.get_total_flops(), 0])

    def leave(name: str, *_: Any) -> None:
        before, of_children = open_calls.pop()
        flops = counter.get_total_flops() - before
        own[name] += (flops - of_children) // 2
        if open_calls:
            open_calls[-1][1] += flops

    for name, module in model.eval().named_modules():
        module.register_forward_pre_hook(partial(enter, name), prepend=True)
        module.register_forward_hook(partial(leave, name))
    listener = _Uncounted(counter)
    with torch.no_grad(), attention_fast_path_disabled(), counter, listener:
        model(*arguments)
    return own, listener.calls


class _Uncounted(TorchDispatchMode):
    """Listens which operators add nothing to a counter."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        if self._counter.get_total_flops() == before and not getattr(func, "is_view", False):
            self.calls[str(func).split(".")[1]] += 1
        return out

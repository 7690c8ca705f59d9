"""Count the multiply-accumulates, parameters and bytes of a network, without data and without changing the network."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

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
        macs: Multiply-accumulates of convolutions, linear layers and other matrix products, including those of
            attention. A fused multiply-add counts once. Biases, norms, activations, pooling and additions do not count.
        parameters: Number of elements of all parameters, trainable or not. Buffers do not count.
        layers: Module name to the multiply-accumulates of the module without its children, in the order of the first
            call.
        not_counted: Name of every operator that added nothing to `macs`, and the number of its calls. Views are
            omitted.
    """

    macs: int
    parameters: int
    layers: Mapping[str, int] = field(default_factory=dict)
    not_counted: Mapping[str, int] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Floating point operations, 2 x `macs`: each multiply-accumulate is a multiplication and an addition."""
        return 2 * self.macs

    def by_layer(self) -> dict[str, int]:
        """Return the multiply-accumulates of every module without its children, omitting modules that have none."""
        return {name: macs for name, macs in self.layers.items() if macs}


def count_network(model: nn.Module, example: object) -> Counts:
    """Count the operations of one forward pass on a copy of a network.

    The copy runs in evaluation mode on the meta device, so nothing is computed and `model` does not change. If the
    forward pass reads the value of a tensor, a second copy runs on the CPU instead.

    Args:
        model: Any module, pruned or not.
        example: An input of the module. A tuple holds the positional arguments; anything else is the only argument. The
            counts refer to the whole input, so pass a batch of one to count a single image.

    Example:
        >>> counts = count_network(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), torch.zeros(1, 3, 32, 32))
        >>> counts.macs, counts.flops, counts.parameters, counts.by_layer()
        (221184, 442368, 224, {'0': 221184})
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    arguments = example if isinstance(example, tuple) else (example,)
    try:
        layers, not_counted = _count_forward(_meta_copy(model), _cast(arguments, model, "meta"))
    except (NotImplementedError, RuntimeError):
        # An operator without a meta implementation, or a forward pass that depends on values.
        layers, not_counted = _count_forward(copy.deepcopy(model).cpu(), _cast(arguments, model, "cpu"))
    return Counts(sum(layers.values()), parameters, layers, dict(not_counted))


def state_bytes(state_dict: Mapping[str, object]) -> int:
    """Return the number of bytes that ``torch.save`` writes for a state dict; a tensor with two names counts once.

    The bytes of the unpruned network divided by those of the pruned one are the compression.
    """
    compact: dict[tuple[object, ...], Tensor] = {}

    def without_shared_storage(tensor: Tensor) -> Tensor:
        # A view would be saved together with its whole storage.
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in compact or not tensor.numel():
            compact[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return compact[key]

    file = io.BytesIO()
    torch.save({k: without_shared_storage(v) if isinstance(v, Tensor) else v for k, v in state_dict.items()}, file)
    return file.getbuffer().nbytes


def _meta_copy(model: nn.Module) -> nn.Module:
    """Copy a module with its parameters and buffers on the meta device, without copying their data."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    # Do not copy the Trainer of a LightningModule, which refers to data loaders and optimizers.
    try:
        trainer = getattr(model, "trainer", None)
    except RuntimeError:  # Lightning raises it if no Trainer is attached
        trainer = None
    if trainer is not None and not isinstance(trainer, nn.Module):
        memo[id(trainer)] = None
    return copy.deepcopy(model, memo)


def _cast(arguments: tuple[object, ...], model: nn.Module, device: str) -> tuple[object, ...]:
    """Move all tensors to a device, and floating point tensors to the dtype of the parameters."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), None)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype if tensor.dtype.is_floating_point else None)

    return tree_map_only(Tensor, cast, arguments)


def _count_forward(model: nn.Module, arguments: tuple[object, ...]) -> tuple[dict[str, int], Counter[str]]:
    """Run one forward pass of a copy, which keeps the hooks that are registered here.

    Returns:
        The multiply-accumulates of every module without its children, and the calls of every operator that has none.
    """
    counter = FlopCounterMode(display=False)
    macs_by_module: dict[str, int] = {}
    # For every module that is running: total FLOPs at its start, and FLOPs of its children.
    running: list[list[int]] = []

    def start_module(name: str, *_: object) -> None:
        macs_by_module.setdefault(name, 0)
        running.append([counter.get_total_flops(), 0])

    def finish_module(name: str, *_: object) -> None:
        flops_at_start, flops_of_children = running.pop()
        flops = counter.get_total_flops() - flops_at_start
        macs_by_module[name] += (flops - flops_of_children) // 2
        if running:
            running[-1][1] += flops

    for name, module in model.eval().named_modules():
        module.register_forward_pre_hook(partial(start_module, name), prepend=True)
        module.register_forward_hook(partial(finish_module, name))

    uncounted = _UncountedOperators(counter)
    with torch.no_grad(), attention_fast_path_disabled(), counter, uncounted:
        model(*arguments)
    return macs_by_module, uncounted.calls


class _UncountedOperators(TorchDispatchMode):
    """Count the calls of operators that add nothing to a FLOP counter."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._counter = counter

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        if self._counter.get_total_flops() == before and not getattr(func, "is_view", False):
            self.calls[str(func).split(".")[1]] += 1
        return out

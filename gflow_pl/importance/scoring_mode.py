"""Scoring leaves no trace: evaluation mode, gradients on, autocast off, and everything restored behind it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from gflow_pl.importance.layers import computing_hooks, recompute_weights

__all__ = ["scoring_mode"]


@contextmanager
def scoring_mode(model: nn.Module, *, autocast_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within: evaluation mode, all floating weights require gradients, autocast off unless a dtype is named.

    Behind it the training flag of every module, ``requires_grad`` of every weight and the state of the random
    generators are what they were. ``.grad`` is not touched by any pass.
    """
    # The flags are set one by one: a module's own `train()` may refuse, and restoring through it would overwrite others.
    modules = [(module, module.training) for module in model.modules()]
    # A weight that is held as a buffer is a frozen one, too (torchvision's FrozenBatchNorm2d).
    held = [m._buffers.get(name) for m in model.modules() for name in ("weight", "bias")]
    weights = [*model.parameters(), *(buffer for buffer in held if buffer is not None)]
    frozen = [w for w in weights if w.is_floating_point() and w.is_leaf and not w.requires_grad]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())} - {torch.device("cpu")}
    try:
        with ExitStack() as stack:
            for kind in {device.type for device in devices if device.type != "meta"}:
                numbers = [device.index for device in devices if device.type == kind]
                stack.enter_context(torch.random.fork_rng(numbers, device_type=kind))
                stack.enter_context(
                    torch.autocast(kind, enabled=autocast_dtype is not None, dtype=autocast_dtype or torch.bfloat16)
                )
            on_cpu = autocast_dtype is not None and not devices
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.autocast("cpu", enabled=on_cpu, dtype=autocast_dtype or torch.bfloat16))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for module, _ in modules:
                module.training = False
                recompute_weights(module)
            for tensor in frozen:
                tensor.requires_grad_(True)
            yield
    finally:
        for module, training in modules:
            module.training = training
        for tensor in frozen:
            tensor.requires_grad_(False)


@contextmanager
def cached_weights(model: nn.Module | None = None) -> Iterator[None]:
    """A weight that is computed is computed once, so that the tensor that is asked for is the one in the graph.

    Args:
        model: Also those of its weights that hooks compute, which do so at every call of their layers.
    """
    hooked = [module for module in (model.modules() if model is not None else ()) if computing_hooks(module)]
    before = [module._forward_pre_hooks for module in hooked]
    with parametrize.cached():
        try:
            for module, hooks in zip(hooked, before, strict=True):
                computing = computing_hooks(module)
                for hook in computing:
                    hook(module, ())
                module._forward_pre_hooks = OrderedDict(
                    (key, hook) for key, hook in hooks.items() if hook not in computing
                )
            yield
        finally:
            for module, hooks in zip(hooked, before, strict=True):
                module._forward_pre_hooks = hooks

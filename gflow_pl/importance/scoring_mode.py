"""The state that a model is scored in, and its restoration."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.common.snapshot import random_states_restored
from gflow_pl.importance.layers import recompute_weights, weight_hooks

__all__ = ["cached_weights", "scoring_mode"]


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into the state in which filters are scored, and restore it afterwards.

    Inside the block the model is in evaluation mode, every floating-point weight requires a gradient, gradients are
    enabled and autocast is disabled. Afterwards the training flag of every module, ``requires_grad`` of every weight
    and the random generators have their former states.
    """
    # A frozen weight may also be a buffer, as in torchvision's FrozenBatchNorm2d.
    buffers = [module._buffers.get(name) for module in model.modules() for name in ("weight", "bias")]
    weights = [*model.parameters(), *(buffer for buffer in buffers if buffer is not None)]
    frozen = [w for w in weights if w.is_floating_point() and w.is_leaf and not w.requires_grad]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    try:
        with ExitStack() as stack:
            stack.enter_context(random_states_restored())
            for kind in {"cpu", *(device.type for device in devices)} - {"meta"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(evaluation_mode(model))
            for module in model.modules():
                recompute_weights(module)
            for tensor in frozen:
                tensor.requires_grad_(True)
            yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


@contextmanager
def cached_weights(model: nn.Module | None = None) -> Iterator[None]:
    """Compute every derived weight once inside the block.

    The tensor that we differentiate is then the one that the forward used.

    Without this, a parametrization computes a new tensor at every access, and a hook one at every call of its layer.

    Args:
        model: Model whose hooks of weight norm and spectral norm are run once as well. None: parametrizations only.
    """
    hooked = [module for module in (model.modules() if model is not None else ()) if weight_hooks(module)]
    before = [module._forward_pre_hooks for module in hooked]
    with parametrize.cached():
        try:
            for module, hooks in zip(hooked, before, strict=True):
                computing = weight_hooks(module)
                for hook in computing:
                    hook(module, ())
                module._forward_pre_hooks = OrderedDict(
                    (key, hook) for key, hook in hooks.items() if hook not in computing
                )
            yield
        finally:
            for module, hooks in zip(hooked, before, strict=True):
                module._forward_pre_hooks = hooks

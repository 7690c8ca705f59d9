"""A network whose forward pass has every side effect that a trace must undo."""

import random

import numpy as np
import torch
from torch import nn


class StatefulNet(nn.Module):
    """Caches tensors, counts calls, writes to a buffer and draws random numbers in four ways.

    Args:
        looks_at_values: Whether the forward pass depends on the value of an activation.
    """

    def __init__(self, looks_at_values: bool = False):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.drop, self.looks_at_values = nn.Dropout(0.5), looks_at_values
        self.calls, self.cache, self.shapes, self.last = 0, {}, [], None
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.shapes.append(tuple(x.shape))
        self.cache["x"] = self.last = x
        random.random(), np.random.rand()
        self.total += 1
        y = self.drop(self.norm(self.conv(x))).relu().mean((2, 3))
        y = y + torch.rand_like(y)
        if self.looks_at_values and y.sum().item() > 1e9:
            y = -y
        return self.head(y + torch.randn(()))


def state_around(model: StatefulNet) -> dict[str, object]:
    """Return copies of everything that a trace of the model could change: generators, tensors, flags, hooks,
    attributes.
    """
    generators = [torch.get_rng_state(), random.getstate(), str(np.random.get_state())]
    if torch.cuda.is_initialized():
        generators += torch.cuda.get_rng_state_all()
    hooks = nn.modules.module
    return {
        "generators": generators,
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": {
            name: (id(p), p.data_ptr(), p.device, p._version, p.grad.clone()) for name, p in model.named_parameters()
        },
        "buffers": {name: (id(b), b.device) for name, b in model.named_buffers()},
        "attributes": [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()],
        "hooks": [
            list(module._forward_hooks.items()) + list(module._forward_pre_hooks.items()) for module in model.modules()
        ],
        "global hooks": len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks),
        "own": (model.calls, dict(model.cache), list(model.shapes), model.last),
        "grad mode": torch.is_grad_enabled(),
    }

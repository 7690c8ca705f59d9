"""The slow, obvious reading of a plan: the same network at full size with everything that goes set to zero."""

import copy

import numpy as np
import torch

from gflow_pl.channels import trace_channels
from gflow_pl.surgery import rewrite
from gflow_pl.values import KeepPlan


def randomised(model):
    """No norm, layer scale, bias or head is left at a value that would make a comparison vacuous."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            drawn = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            if tensor.ndim <= 1:
                tensor.copy_(drawn + 0.5)
            elif tensor.numel() == tensor.shape.numel() and (tensor.std() < 1e-4 or tensor.shape[1:].numel() == 1):
                tensor.copy_(drawn - 0.4)
        for name, tensor in model.named_buffers():
            if tensor.is_floating_point() and tensor.ndim == 1:
                drawn = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(drawn + 0.5 if "var" in name else drawn - 0.5)
    return model


def random_plan(graph, share=0.5, seed=0, only=lambda group: True):
    """Half of the units of every group go, at least one stays."""
    rng = np.random.default_rng(seed)
    keep = {}
    for group in graph.groups:
        stays = np.ones(group.size, dtype=bool)
        if only(group):
            stays[rng.permutation(group.size)[: min(round(group.size * share), group.size - 1)]] = False
        keep[group.name] = torch.from_numpy(stays)
    return KeepPlan(keep)


def masked_twin(model, graph, plan):
    """A deepcopy with every slice of a unit that goes set to zero, and zeros behind what is expanded."""
    twin = copy.deepcopy(model)
    tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    modules = dict(twin.named_modules())
    for group in graph.groups:
        gone = ~plan[group.name].numpy()
        with torch.no_grad():
            for part in group.slices:
                tensor = tensors[part.tensor]
                tensor.index_fill_(part.dim, torch.from_numpy(part.index[gone].ravel()).to(tensor.device), 0)
        if group.expansion is not None:
            channels = torch.from_numpy(group.layers[0].index[gone].ravel())
            dim = group.expansion.dim
            present = getattr(modules[group.expansion.module], "_gflow_index", None)
            channels = (
                channels if present is None else present.cpu()[channels]
            )  # pruned before: places in the full width
            modules[group.expansion.module].register_forward_hook(
                lambda _, __, out, dim=dim, channels=channels: out.index_fill(dim, channels.to(out.device), 0)
            )
    return twin


def deviation(model, inputs, *, share=0.5, seed=0, only=lambda group: group.inexact is None, **settings):
    """Relative distance of the rewritten network from its masked twin, and of that from the full network, float64."""
    model = randomised(model.double()).eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    graph = trace_channels(model, inputs, **settings)
    plan = random_plan(graph, share, seed, only)
    small = copy.deepcopy(model)
    with torch.no_grad():
        full, masked = model(*inputs), masked_twin(model, graph, plan)(*inputs)
        rewrite(small, graph.copy(), plan)
        pruned = small(*inputs)
    scale = masked.abs().max()
    return float((pruned - masked).abs().max() / scale), float((masked - full).abs().max() / scale), graph, small

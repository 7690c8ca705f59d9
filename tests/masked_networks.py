"""A slow, obvious reference for pruned networks: the full-size network with the slices of removed units zeroed."""

import copy

import numpy as np
import torch

from gflow_pl.channels import trace_channels
from gflow_pl.surgery import rewrite
from gflow_pl.values import KeepPlan
from gflow_pl.values.expansion_names import EXPANSION


def randomize_parameters(model):
    """Draw norms, layer scales, biases and heads at random, and return the model.

    Their initial values (ones, zeros, tiny constants) would make a comparison of outputs vacuous.
    """
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
    """Return a plan that removes a share of the units of every group that `only` accepts; at least one unit stays."""
    rng = np.random.default_rng(seed)
    keep = {}
    for group in graph.groups:
        stays = np.ones(group.size, dtype=bool)
        if only(group):
            stays[rng.permutation(group.size)[: min(round(group.size * share), group.size - 1)]] = False
        keep[group.name] = torch.from_numpy(stays)
    return KeepPlan(keep)


def masked_network(model, graph, plan):
    """Return a copy in which every slice of a removed unit and the removed outputs of expanded layers are zero."""
    masked = copy.deepcopy(model)
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    modules = dict(masked.named_modules())
    for group in graph.groups:
        removed = ~plan[group.name].numpy()
        with torch.no_grad():
            for part in group.slices:
                tensor = tensors[part.tensor]
                tensor.index_fill_(part.dim, torch.from_numpy(part.index[removed].ravel()).to(tensor.device), 0)
        if group.expansion is not None:
            channels = torch.from_numpy(group.layers[0].index[removed].ravel())
            dim = group.expansion.dim
            # Positions in the full width, if the module was expanded before.
            present = getattr(modules[group.expansion.module], EXPANSION.positions, None)
            channels = channels if present is None else present.cpu()[channels]
            modules[group.expansion.module].register_forward_hook(
                lambda _, __, out, dim=dim, channels=channels: out.index_fill(dim, channels.to(out.device), 0)
            )
    return masked


def compare_with_masked(model, inputs, *, share=0.5, seed=0, only=lambda group: group.inexact is None, **settings):
    """Prune a model at random in float64, and compare its output with that of the masked network.

    Args:
        model: The model; it is converted to float64, and its parameters are randomized.
        inputs: Positional arguments of its forward.
        share: See `random_plan`.
        seed: See `random_plan`.
        only: See `random_plan`.
        **settings: Settings of `trace_channels`.

    Returns:
        Largest difference between pruned and masked network, and between masked and full network, both relative to the
        largest output of the masked network; the graph; the pruned network.
    """
    model = randomize_parameters(model.double()).eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    graph = trace_channels(model, inputs, **settings)
    plan = random_plan(graph, share, seed, only)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        full, masked = model(*inputs), masked_network(model, graph, plan)(*inputs)
        rewrite(pruned, graph.copy(), plan)
        output = pruned(*inputs)
    scale = masked.abs().max()
    return float((output - masked).abs().max() / scale), float((masked - full).abs().max() / scale), graph, pruned

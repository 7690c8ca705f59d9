"""The device of the tests in this folder, and helpers to compare results across devices."""

import math
import os
import shutil

import pytest
import torch

ON_CUDA = os.environ.get("GFLOW_GPU_TESTS_ON", "cuda") == "cuda"
DEVICE = torch.device("cuda", 0) if ON_CUDA else torch.device("cpu")
ACCELERATOR = "gpu" if ON_CUDA else "cpu"

only_cuda = pytest.mark.skipif(not ON_CUDA, reason="only CUDA has this")
has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
inductor = pytest.param(
    "inductor", marks=pytest.mark.skipif(not ON_CUDA or not has_compiler, reason="only CUDA, with a C compiler")
)


def moved(batches, device=DEVICE):
    """Return batches of tensors, moved to a device."""
    return [tuple(tensor.to(device) for tensor in batch) for batch in batches]


def distance(ours, theirs):
    """Return the largest absolute difference over the largest absolute value, in float64; infinity for NaN."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    assert ours.shape == theirs.shape, (tuple(ours.shape), tuple(theirs.shape))
    if not ours.numel():
        return 0.0
    found = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-300))
    return math.inf if math.isnan(found) else found


def on_device(module):
    """Return whether all parameters, buffers and gradients of a module are on the device."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    return all(tensor.device == DEVICE for tensor in tensors)

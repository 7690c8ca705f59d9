"""The device that the tests of this folder run on, and small helpers to compare across devices."""

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
    """Batches of tensors on a device."""
    return [tuple(tensor.to(device) for tensor in batch) for batch in batches]


def distance(ours, theirs):
    """The largest difference, in units of the largest value, infinite where one is NaN; on the CPU, in float64."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    assert ours.shape == theirs.shape, (tuple(ours.shape), tuple(theirs.shape))
    if not ours.numel():
        return 0.0
    found = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-300))
    return math.inf if math.isnan(found) else found


def on_device(module):
    """Whether every parameter and buffer, and every gradient, is on the device."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    return all(tensor.device == DEVICE for tensor in tensors)

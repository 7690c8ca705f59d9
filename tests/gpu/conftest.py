"""Tests on a GPU with CUDA. GFLOW_GPU_TESTS_ON=cpu runs them on the CPU, except those that only CUDA supports."""

import os
import sys
from pathlib import Path

import pytest
import torch
from gpu_device import DEVICE, ON_CUDA

HERE = Path(__file__).parent
for folder in (HERE.parent / "callbacks", HERE.parent / "importance"):
    sys.path.append(str(folder))  # helper modules: small_nets, importance_nets

# Set before CUDA is initialized, and inherited by child processes: reproducible results, and float32 products without
# TF32.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a GPU with CUDA (GFLOW_GPU_TESTS_ON=cpu runs it on the CPU)")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if ON_CUDA and not torch.cuda.is_available():
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_kernels_every_time():
    """Make cuDNN use deterministic kernels and choose them without timing."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)  # a Trainer leaves them enabled
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()


@pytest.fixture
def deterministic():
    """Use deterministic operators where they exist."""
    torch.use_deterministic_algorithms(True, warn_only=True)

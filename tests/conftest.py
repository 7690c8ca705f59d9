"""Settings for all tests: an import path for shared helpers, one thread, no command-line arguments."""

import os
import sys
from pathlib import Path

import pytest
import torch

# This folder contains the helper modules that several test folders share: golden_recipe, real_images, ...
sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)

# Lightning calls names that jsonargparse 4 has deprecated. The `gflow` command turns this warning off, too.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture(autouse=True)
def no_command_line_arguments(monkeypatch):
    """Hide pytest's arguments: LightningCLI warns about arguments in `sys.argv` if it is called with `args`."""
    monkeypatch.setattr(sys, "argv", ["gflow"])

"""Settings for every test: shared helpers importable, one thread, a neutral command line."""

import sys
from pathlib import Path

import pytest
import torch

# Helper modules of the tests (golden_recipe, real_images, ...) lie in this folder.
sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def neutral_argv(monkeypatch):
    """LightningCLI warns when it gets `args=` while sys.argv holds pytest's own arguments."""
    monkeypatch.setattr(sys, "argv", ["gflow"])

"""On two ranks, copies are cut alike on both."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
def test_copies_are_cut_alike_on_two_ranks(tmp_path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "copied_ranks.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("MeanTeacher", "Target", "Hidden"):
        ranks = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert ranks[0]["net"]["4.weight"].shape[0] < 12
        assert {n: p.shape for n, p in ranks[0]["net"].items()} == {n: p.shape for n, p in ranks[0]["teacher"].items()}
        for part in ("net", "teacher"):
            assert all(torch.equal(p, ranks[1][part][n]) for n, p in ranks[0][part].items()), (name, part)

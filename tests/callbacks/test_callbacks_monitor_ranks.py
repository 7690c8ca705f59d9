"""Two gloo processes measure the gradient of the global batch, like one process."""

import subprocess
import sys
from pathlib import Path

import monitor_ranks
import pytest
import torch


def test_rows_of_two_ranks_equal_those_of_one_process_on_the_global_batches(tmp_path) -> None:
    script = Path(__file__).parent / "monitor_ranks.py"
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    single = monitor_ranks.rows(tmp_path, 0, 1)
    assert len(first) == len(single) > 6
    for row, expected in zip(first, single, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == (pytest.approx(value, rel=1e-8, abs=1e-12) if isinstance(value, float) else value), key
            assert value is not None

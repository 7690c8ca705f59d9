"""Ranks that draw other random numbers prune by one graph, that of rank 0."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from drawn_depths import RandomDepth

from gflow_pl import trace_channels
from gflow_pl.callbacks.lightning import ranks
from gflow_pl.callbacks.lightning.rng import isolated_rng


def test_two_ranks_whose_networks_draw_their_depth_prune_alike(tmp_path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "drawn_depths.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["kept"] == second["kept"]
    assert first["parameters"]["stem.weight"].shape[0] < 12
    assert all(torch.equal(p, second["parameters"][name]) for name, p in first["parameters"].items())


def test_a_graph_does_not_depend_on_the_state_of_the_generators() -> None:
    torch.manual_seed(0)
    model, graphs = RandomDepth(), []
    for seed in range(6):
        with isolated_rng(seed):
            before = torch.get_rng_state()
            graphs.append(str(trace_channels(model, torch.randn(4, 8)).as_dict()))
            torch.set_rng_state(before)
    assert len(set(graphs)) == 1


class TwoRanks:
    """What `ranks` asks of a Trainer, with a broadcast that hands over what rank 0 has sent."""

    sent: tuple

    def __init__(self, rank: int) -> None:
        self.global_rank, self.world_size, self.strategy = rank, 2, self

    def broadcast(self, value, src):
        if self.global_rank == src:
            TwoRanks.sent = value
        return TwoRanks.sent


def test_an_error_of_rank_0_is_raised_on_every_rank(monkeypatch) -> None:
    monkeypatch.setattr(ranks, "num_ranks", lambda trainer: 2)

    def fails():
        assert not torch.distributed.is_initialized()
        raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match="no such layer"):
        ranks.computed_on_rank_zero(TwoRanks(0), fails)
    with pytest.raises(ValueError, match="Rank 0 has raised RuntimeError: no such layer"):
        ranks.computed_on_rank_zero(TwoRanks(1), fails)
    assert ranks.computed_on_rank_zero(TwoRanks(0), lambda: 3) == ranks.computed_on_rank_zero(TwoRanks(1), fails) == 3

"""Random states in checkpoints, and random numbers that do not affect the global generators."""

import random

import numpy as np
import torch

from gflow_pl.callbacks.lightning.rng import capture_rng_state, isolated_rng, restore_rng_state


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_random_states_are_restored_from_a_weights_only_file(tmp_path) -> None:
    random.gauss(0, 1)  # caches a second value, which must be restored as well
    torch.save(capture_rng_state(), tmp_path / "rng.pt")
    first = draw(), random.gauss(0, 1)
    restore_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (draw(), random.gauss(0, 1)) == first


def test_isolated_random_numbers_follow_from_the_seeds_and_leave_the_global_generators_alone() -> None:
    before = capture_rng_state()
    with isolated_rng(1, 2):
        inside = draw()
    with isolated_rng(1, 2):
        assert draw() == inside
    with isolated_rng(1, 3):
        assert draw() != inside
    restore_rng_state(before)
    expected = draw()
    restore_rng_state(before)
    with isolated_rng(5):
        draw()
    assert draw() == expected

"""The parts that the PruningCallback is made of, each by itself."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from gflow_pl.callbacks.lightning.held_lr import HeldLearningRate
from gflow_pl.callbacks.lightning.rng import capture_rng_state, isolated_rng, restore_rng_state
from gflow_pl.callbacks.pruning_settings import CutTimes


def test_round_k_is_cut_at_the_start_of_epoch_warmup_plus_k() -> None:
    assert CutTimes(3).epochs == (1, 2, 3)
    assert CutTimes(3, warmup_epochs=2).epochs == (3, 4, 5)
    assert CutTimes(2, warmup_epochs=1, every_n_epochs=3).epochs == (4, 7)
    assert CutTimes(3, epochs=[0, 3, 9]).epochs == (0, 3, 9)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"warmup_epochs": -1}, "`warmup_epochs` must be a whole number >= 0, got -1."),
        ({"every_n_epochs": 0}, "`every_n_epochs` must be a whole number >= 1, got 0."),
        ({"epochs": [1]}, "`epochs` names 1 cuts, but there are 2 rounds"),
        ({"epochs": [3, 1]}, "`epochs` must ascend"),
        ({"epochs": [-1, 1]}, "whole numbers >= 0"),
        ({"epochs": [1, 2], "warmup_epochs": 1}, "leave `warmup_epochs`"),
    ],
)
def test_bad_times_are_one_sentence(arguments, sentence) -> None:
    with pytest.raises(ValueError) as error:
        CutTimes(2, **arguments)
    assert sentence in str(error.value)


def test_a_last_cut_that_no_epoch_follows_is_refused() -> None:
    times = CutTimes(2, warmup_epochs=1)  # cuts at 2 and 3
    times.check_fits(4)
    times.check_fits(None)
    times.check_fits(-1)
    with pytest.raises(ValueError, match="set max_epochs to at least 4"):
        times.check_fits(3)


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_random_states_come_back_from_a_weights_only_file(tmp_path) -> None:
    random.gauss(0, 1)  # leaves a cached value behind, which must come back as well
    torch.save(capture_rng_state(), tmp_path / "rng.pt")
    first = draw(), random.gauss(0, 1)
    restore_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (draw(), random.gauss(0, 1)) == first


def test_private_random_numbers_follow_from_the_seeds_and_leave_the_global_ones_alone() -> None:
    before = draw, capture_rng_state()
    with isolated_rng(1, 2):
        inside = draw()
    with isolated_rng(1, 2):
        assert draw() == inside
    with isolated_rng(1, 3):
        assert draw() != inside
    restore_rng_state(before[1])
    expected = draw()
    restore_rng_state(before[1])
    with isolated_rng(5):
        draw()
    assert draw() == expected


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_a_held_rate_is_what_steps_are_taken_with_and_nothing_else_sees_it(optimizer_class) -> None:
    def run(held: float | None) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).double()
        optimizer = optimizer_class(layer.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        steps = 0
        if held is not None:
            HeldLearningRate(held, [optimizer], lambda: steps < 2)
        rates = []
        for steps in range(4):  # noqa: B007 - read by the lambda
            optimizer.zero_grad()
            layer(torch.ones(1, 3).double()).sum().backward()
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        return rates, layer.weight.detach().clone()

    plain_rates, plain = run(None)
    held_rates, held = run(0.01)
    assert held_rates == plain_rates == [0.5, 0.25, 0.125, 0.0625]
    assert not torch.equal(plain, held)

    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    optimizer = optimizer_class(layer.parameters(), lr=0.01)
    for rate in (0.01, 0.01, 0.125, 0.0625):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        layer(torch.ones(1, 3).double()).sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight, held)

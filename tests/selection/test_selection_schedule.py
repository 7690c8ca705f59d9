"""Schedules against the numbers of the published code, and their own invariants."""

import math
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gflow_pl import PruningCallback
from gflow_pl.selection import PruningSchedule, round_fraction

GOLDEN = Path(__file__).parent.parent / "golden" / "rounds.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


def test_fractions_and_kept_shares_equal_the_published_ones(golden):
    compared = 0
    for percent in (25, 50, 75, 90):
        for rounds in (1, 5, 25):
            prefix = f"p{percent}_n{rounds}__"
            schedule = PruningSchedule(percent / 100, rounds)
            ks = range(1, rounds + 1)
            np.testing.assert_allclose(
                [round_fraction(k, rounds, percent / 100) for k in ks], golden[prefix + "p_ratios"], rtol=1e-13
            )
            np.testing.assert_allclose(
                [schedule.kept_after(k) for k in ks], golden[prefix + "kept_fraction_exact"], rtol=1e-12
            )
            compared += 2 * rounds
    assert compared == 2 * 4 * 31


def test_truncated_percentages_equal_the_published_ones(golden):
    compared = 0
    for percent in (25, 50, 75, 90):
        for rounds in (1, 5, 25):
            schedule = PruningSchedule(percent / 100, rounds, published_truncation=True)
            expected = golden[f"p{percent}_n{rounds}__p_cumulative_int"].tolist()
            assert [schedule.kept_after(k) * 100 for k in range(1, rounds + 1)] == pytest.approx(expected, abs=1e-9)
            compared += rounds
    assert compared == 4 * 31


def test_thresholds_equal_the_published_ones(golden):
    schedule = PruningSchedule(thresholds=[0.1, 0.5, 0.8])
    assert schedule.num_rounds == golden["thresholds_10_50_80__n_rounds"] == 3
    np.testing.assert_allclose(
        [1 - schedule.kept_after(k) / schedule.kept_after(k - 1) for k in (1, 2, 3)],
        golden["thresholds_10_50_80__p_ratios"],
        rtol=1e-13,
    )
    np.testing.assert_allclose(
        [schedule.kept_after(k) for k in (1, 2, 3)], golden["thresholds_10_50_80__kept_fraction_exact"], rtol=1e-12
    )
    truncated = PruningSchedule(thresholds=[0.1, 0.5, 0.8], published_truncation=True)
    assert [round(truncated.kept_after(k) * 100) for k in (1, 2, 3)] == [90, 50, 19]


def test_fractions_multiply_to_the_kept_share():
    schedule = PruningSchedule(0.6, 7)
    kept = 1.0
    for k in range(1, 8):
        kept *= 1 - round_fraction(k, 7, 0.6)
        assert kept == pytest.approx(schedule.kept_after(k))


@given(
    original=st.integers(1, 5000),
    fraction=st.floats(0.01, 0.99),
    rounds=st.integers(1, 40),
)
def test_targets_of_all_rounds_add_up_to_the_floor_of_the_fraction(original, fraction, rounds):
    schedule = PruningSchedule(fraction, rounds)
    present = original
    for k in range(1, rounds + 1):
        target = schedule.target(k, original, present)
        assert 0 <= target <= present
        present -= target
    assert present == original - math.floor(fraction * original + 1e-9)


def test_targets_with_the_published_truncation_end_where_the_published_rounds_end():
    schedule, present = PruningSchedule(0.75, 25, published_truncation=True), 2128
    for k in range(1, 26):
        present -= schedule.target(k, 2128, present)
    assert present == 2128 - math.floor(0.82 * 2128)


class HundredFilters(pl.LightningModule):
    """A network with 100 filters, so that the number left is a percentage."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(4, 3), torch.arange(4) % 2), batch_size=4)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        *((f"p{p}_n{n}", {"fraction": p / 100, "rounds": n}) for p in (25, 50, 75, 90) for n in (1, 5, 25)),
        ("thresholds_10_50_80", {"thresholds": [0.1, 0.5, 0.8]}),
    ],
)
def test_a_whole_run_with_the_published_truncation_keeps_the_published_numbers(golden, name, schedule, tmp_path):
    expected = golden[f"{name}__p_cumulative_int"].tolist()
    pruning = PruningCallback("magnitude", **schedule, published_truncation=True, min_kept=0.0)
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    module = HundredFilters()
    pl.Trainer(max_epochs=len(expected) + 1, callbacks=[pruning], **settings).fit(module)
    assert [row["filters_left"] for row in pruning.rows] == expected
    assert module.net[0].out_features + module.net[2].out_features == expected[-1]


def test_a_round_corrects_for_what_an_earlier_one_left_over():
    schedule = PruningSchedule(0.5, 2)
    first = schedule.target(1, 100, 100)
    assert first == 33
    assert schedule.target(2, 100, 100 - first) == 17
    assert schedule.target(2, 100, 100 - first + 5) == 22
    assert schedule.target(2, 100, 40) == 0
    assert schedule.share(2, 1000.0, 800.0) == pytest.approx(0.375)
    assert schedule.share(2, 1000.0, 400.0) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"fraction": 75, "rounds": 5},
            r"`fraction` must be in \(0, 1\), got 75. It is a fraction: for 75 % write 0.75.",
        ),
        ({"fraction": 0.0, "rounds": 5}, r"`fraction` must be in \(0, 1\), got 0.0."),
        ({"fraction": float("nan"), "rounds": 5}, r"`fraction` must be in \(0, 1\), got nan."),
        ({"fraction": True, "rounds": 5}, r"`fraction` must be in \(0, 1\), got True."),
        ({"fraction": 0.5, "rounds": 0}, "`rounds` must be a whole number of at least 1, got 0"),
        ({"fraction": 0.5, "rounds": 2.5}, "`rounds` must be a whole number of at least 1, got 2.5"),
        ({"fraction": 0.5}, "`rounds` must be a whole number of at least 1, got None"),
        ({"rounds": 3}, "either `fraction` .* or `thresholds`, got neither"),
        ({"fraction": 0.5, "rounds": 1, "thresholds": [0.5]}, "got both"),
        ({"thresholds": [10, 50, 80]}, "for 10 % write 0.1"),
        ({"thresholds": [0.5, 0.1]}, "must ascend .* got 0.1 after 0.5"),
        ({"thresholds": [0.5, 0.5]}, "must ascend"),
        ({"thresholds": []}, "must be a list of fractions"),
        ({"thresholds": [0.1, 0.5], "rounds": 3}, "names 2 rounds, but `rounds` is 3"),
    ],
)
def test_impossible_schedules_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        PruningSchedule(**arguments)


def test_a_round_outside_the_schedule_is_refused():
    with pytest.raises(ValueError, match="rounds count from 1 to 5"):
        round_fraction(6, 5, 0.5)
    with pytest.raises(ValueError, match="rounds count from 1 to 5"):
        PruningSchedule(0.5, 5).kept_after(6)

"""Files that were written before the package had its present rooms load and resume."""

import sys
from pathlib import Path

import old_layout_net
import pytest
import torch
from old_layout_net import RUNS, TinyModule, TinyNet, fit

import gflow_pl
from gflow_pl.surgery import load_pruned

HERE = Path(__file__).parent
EXPECTED = torch.load(HERE / "expected.pt", weights_only=True)
"""The weights and the rows at the end of each run, from the code that wrote the files."""


def assert_same_weights(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    assert len(found) >= 14
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_loads_in_its_pruned_shape(name):
    state = torch.load(HERE / f"{name}.ckpt", weights_only=True)["state_dict"]
    module = gflow_pl.load_from_checkpoint(TinyModule, HERE / f"{name}.ckpt")
    assert_same_weights(module.state_dict(), state)
    assert module(torch.randn(2, 3, 8, 8)).shape == (2, 4)
    assert len(state["net.conv1.weight"]) < len(TinyNet().conv1.weight)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_resumed(name, tmp_path):
    """The checkpoint is of one round; the resumed run cuts the other, and ends where the uninterrupted run ended."""
    module, pruning = fit(name, tmp_path, ckpt_path=str(HERE / f"{name}.ckpt"))
    assert_same_weights(module.state_dict(), EXPECTED[name]["weights"], 1e-5)  # kernels differ between CPUs
    assert [row["round"] for row in pruning.rows] == [1, 2]
    for row, expected in zip(pruning.rows, EXPECTED[name]["rows"], strict=True):
        assert list(row) == [*expected, "seconds"]
        for key, value in expected.items():
            assert row[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key


@pytest.mark.parametrize("name", RUNS)
def test_the_uninterrupted_run_still_ends_there(name, tmp_path):
    module, _ = fit(name, tmp_path)
    assert_same_weights(module.state_dict(), EXPECTED[name]["weights"], 1e-5)


def test_a_pruned_state_dict_loads():
    network = TinyNet()
    load_pruned(network, HERE / "pruned.pt")
    expected = {key.removeprefix("net."): value for key, value in EXPECTED["last"]["weights"].items()}
    assert_same_weights(network.state_dict(), expected)


def test_a_classifier_loads(monkeypatch):
    """Its hyper-parameters name a network by class path, which has to be trusted."""
    monkeypatch.setitem(sys.modules, "net", old_layout_net)
    state = torch.load(HERE / "classifier.ckpt", weights_only=True)["state_dict"]
    with pytest.raises(ValueError, match=r"names the class 'net\.TinyNet'"):
        gflow_pl.ImageClassifier.load_from_checkpoint(HERE / "classifier.ckpt")
    module = gflow_pl.ImageClassifier.load_from_checkpoint(HERE / "classifier.ckpt", trust_file=True)
    assert_same_weights(module.state_dict(), state)

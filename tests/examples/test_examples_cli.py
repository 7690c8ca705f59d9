"""The commands with classes of another package, and the callback in a LightningCLI script of another author."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

THEIRS = Path(__file__).parent.parent.parent / "examples" / "lightning_cli"
CLASSES = ["--model", "their_pkg.Module", "--data", "their_pkg.Data"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "4", "--trainer.enable_progress_bar", "false"]
QUIET += ["--trainer.enable_model_summary", "false"]
FULL = {"stem.weight": (16, 1, 3, 3), "inner.weight": (32, 16, 3, 3), "outer.weight": (16, 32, 3, 3)}


def run(folder: Path, *command: str) -> str:
    """Run a command in ``folder/work``, where the package in ``folder/theirs`` can be imported."""
    paths = [str(folder / "theirs"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder / "work",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def gflow(folder: Path, command: str, *options: str) -> str:
    return run(folder, "-m", "gflow_pl", command, *CLASSES, *QUIET, *options)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: tuple(value.shape) for name, value in state.items()}


def num_parameters(path: Path) -> int:
    return sum(value.numel() for value in torch.load(path, weights_only=True)["state_dict"].values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with their package in one folder and a pruning run of it in another."""
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(THEIRS, folder / "theirs")
    (folder / "work").mkdir()
    pruning = ["--pruning.measure", "loss", "--pruning.fraction", "0.5", "--pruning.rounds", "2"]
    gflow(folder, "prune", *pruning, "--pruning.num_samples", "64", "--trainer.max_epochs", "4", "--name", "pruned")
    return folder


def test_prune_makes_their_network_smaller(folder) -> None:
    pruned = folder / "work" / "checkpoints" / "pruned"
    assert [row["filters_left"] for row in rows_of(pruned / "pruning.csv")] == ["43", "32"]
    shapes = shapes_of(pruned / "best.ckpt")
    assert shapes["stem.weight"] == FULL["stem.weight"]  # the stem of a residual stream is protected
    assert shapes["inner.weight"][0] + shapes["outer.weight"][0] == 16
    assert shapes_of(pruned / "unpruned.ckpt").items() >= FULL.items()


def test_finetune_trains_on_in_the_pruned_shape(folder) -> None:
    source = folder / "work" / "checkpoints" / "pruned" / "best.ckpt"
    gflow(folder, "finetune", "--pretrained", str(source), "--trainer.max_epochs", "2", "--name", "tuned")
    tuned = source.parent.parent / "tuned"
    assert [row["epoch"] for row in rows_of(tuned / "metrics.csv")] == ["0", "1"]
    assert shapes_of(tuned / "last.ckpt") == shapes_of(source)
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (source, tuned / "last.ckpt"))
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_test_reports_on_the_pruned_file_beside_the_network_as_it_was(folder) -> None:
    pruned = folder / "work" / "checkpoints" / "pruned"
    options = ["--ckpt_path", str(pruned / "last.ckpt"), "--base", str(pruned / "unpruned.ckpt"), "--name", "tested"]
    gflow(folder, "test", *options)
    report = json.loads((pruned.parent / "tested" / "report.json").read_text())["networks"]
    last = rows_of(pruned / "metrics.csv")[-1]
    assert report["pruned"]["test_accuracy"] == pytest.approx(float(last["test_accuracy"]), abs=1e-6)
    assert report["unpruned"]["test_accuracy"] is not None
    assert report["unpruned"]["parameters"] == num_parameters(pruned / "unpruned.ckpt")
    assert report["pruned"]["parameters"] == num_parameters(pruned / "last.ckpt")
    # Their package does not describe the inputs, so the network is counted on an example of the test data.
    positions = 8 * 8
    assert report["unpruned"]["macs"] == positions * 9 * (16 + 16 * 32 + 32 * 16) + 160
    assert report["pruned"]["macs"] == int(rows_of(pruned / "pruning.csv")[-1]["macs"])
    assert (report["unpruned"]["filters"], report["pruned"]["filters"]) == (64, 32)


def test_another_class_starts_from_its_own_defaults_and_not_from_ours_of_the_same_name(folder) -> None:
    """`lr` and `batch_size` are also names of settings of our module and our data."""
    settings = yaml.safe_load((folder / "work" / "checkpoints" / "pruned" / "config.yaml").read_text())
    assert settings["model"] == {"class_path": "their_pkg.Module", "init_args": {"width": 16, "lr": 0.01}}
    assert settings["data"] == {"class_path": "their_pkg.Data", "init_args": {"batch_size": 64}}
    output = yaml.safe_load(gflow(folder, "prune", "--model.lr", "0.3", "--print_config"))
    assert output["model"]["init_args"] == {"width": 16, "lr": 0.3}
    assert output["data"]["init_args"] == {"batch_size": 64}


RANKS = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def accuracy_of(folder: Path, name: str) -> float:
    report = json.loads((folder / "work" / "checkpoints" / name / "report.json").read_text())
    return report["networks"]["pruned"]["test_accuracy"]


def test_an_accuracy_by_two_processes_is_that_of_one_to_the_last_image(folder) -> None:
    """Evaluate an odd number of images by a module that logs without `sync_dist`."""
    theirs = (folder / "theirs" / "their_pkg.py").read_text()
    assert theirs.count(", sync_dist=True") == 2
    (folder / "theirs" / "careless.py").write_text(theirs.replace(", sync_dist=True", ""))
    careless = ["--model", "careless.Module", "--data", "careless.Data", "--trainer.accelerator", "cpu"]
    file = ["--ckpt_path", "checkpoints/pruned/last.ckpt", "--data.batch_size", "50"]
    run(folder, "-m", "gflow_pl", "test", *careless, *file, "--name", "one")
    run(folder, "-m", "gflow_pl", "test", *careless, *file, "--name", "two", *RANKS)
    right = 359 * accuracy_of(folder, "one")
    assert round(right) == pytest.approx(right, abs=1e-3)
    assert accuracy_of(folder, "two") == accuracy_of(folder, "one")


@pytest.mark.slow
def test_prune_and_finetune_by_two_processes(folder) -> None:
    pruning = ["--pruning.measure", "loss", "--pruning.fraction", "0.5", "--pruning.rounds", "2"]
    gflow(folder, "prune", *pruning, *RANKS, "--trainer.max_epochs", "4", "--name", "by_two")
    place = folder / "work" / "checkpoints"
    assert [row["filters_left"] for row in rows_of(place / "by_two" / "pruning.csv")] == ["43", "32"]
    file = ["--pretrained", "checkpoints/by_two/best.ckpt"]
    gflow(folder, "finetune", *file, *RANKS, "--trainer.max_epochs", "2", "--name", "tuned_by_two")
    assert [row["epoch"] for row in rows_of(place / "tuned_by_two" / "metrics.csv")] == ["0", "1"]
    assert shapes_of(place / "tuned_by_two" / "last.ckpt") == shapes_of(place / "by_two" / "best.ckpt")
    gflow(folder, "test", "--ckpt_path", "checkpoints/tuned_by_two/last.ckpt", *RANKS, "--name", "measured_by_two")
    gflow(folder, "test", "--ckpt_path", "checkpoints/tuned_by_two/last.ckpt", "--name", "measured_by_one")
    assert accuracy_of(folder, "measured_by_two") == accuracy_of(folder, "measured_by_one")


@pytest.mark.slow
def test_fit_trains_their_network_whole(folder) -> None:
    gflow(folder, "fit", "--trainer.max_epochs", "1", "--name", "fitted")
    fitted = folder / "work" / "checkpoints" / "fitted"
    assert shapes_of(fitted / "last.ckpt").items() >= FULL.items()
    assert not (fitted / "pruning.csv").exists()


def test_a_plain_lightning_cli_prunes_by_a_settings_file_alone(folder) -> None:
    script, settings = str(folder / "theirs" / "train.py"), str(folder / "theirs" / "pruning.yaml")
    output = run(folder, script, "fit", "--config", settings, *QUIET, "--trainer.limit_val_batches", "2")
    assert "Round 2 of 2 by loss (epoch 2)" in output
    (path,) = (folder / "work" / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt")
    shapes = shapes_of(path)
    assert shapes["inner.weight"][0] + shapes["outer.weight"][0] == 16
    callbacks = torch.load(path, weights_only=True)["callbacks"]
    assert [row["round"] for row in callbacks["PruningCallback"]["rows"]] == [1, 2]
    assert [row["epoch"] for row in callbacks["GradientFlowMonitor"]["rows"]] == [0, 1, 2, 3, 4]
    # The script builds the full-size network, which takes the shape of the file.
    output = run(folder, script, "test", "--config", settings, *QUIET, "--ckpt_path", str(path))
    assert "test_accuracy" in output

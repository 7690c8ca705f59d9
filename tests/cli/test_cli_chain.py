"""Runs of several commands, each of which uses the files of the one before."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gflow_pl.__main__ import main
from gflow_pl.models import MODELS
from gflow_pl.tasks import ImageClassifier

ROOT = Path(__file__).parent.parent.parent
TINY = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]
TINY += ["--trainer.accelerator", "cpu", "--data.batch_size", "8"]


def gflow(*arguments: str) -> str:
    """Run a command in a new process and return its output."""
    done = subprocess.run([sys.executable, "-m", "gflow_pl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_network_passes_through_all_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gflow("fit", "--model.network", "vgg13", "--trainer.max_epochs", "1", "--name", "base", *TINY)
    base = Path("checkpoints/base/best.ckpt")
    assert base.is_file()

    # The network need not be named again, because the file contains its name.
    pruning = ["--pruning.fraction", "0.5", "--pruning.rounds", "2", "--pruning.num_samples", "16"]
    output = gflow(
        "prune", "--model.pretrained", str(base), "--trainer.max_epochs", "4", "--name", "pruned", *pruning, *TINY
    )
    assert "Best test accuracy after the last round" in output
    pruned = Path("checkpoints/pruned")
    assert str(pruned / "best.ckpt") in output
    rows = rows_of(pruned / "metrics.csv")
    assert [row["phase"] for row in rows] == ["pruning", "pruning", "final", "final"]
    assert int(rows[-1]["filters"]) == 2944 - 1472
    assert [row["epoch"] for row in rows_of(pruned / "pruning.csv")] == ["1", "2"]
    best = torch.load(pruned / "best.ckpt", weights_only=True)
    assert best["epoch"] >= 2, "the best epoch is chosen among those after the last round"

    gflow(
        "finetune",
        "--model.pretrained",
        str(pruned / "best.ckpt"),
        "--trainer.max_epochs",
        "2",
        "--name",
        "tuned",
        *TINY,
    )
    tuned = rows_of(Path("checkpoints/tuned/metrics.csv"))
    assert [row["epoch"] for row in tuned] == ["0", "1"]
    last = torch.load("checkpoints/tuned/last.ckpt", weights_only=True)
    shapes = {name: value.shape for name, value in last["state_dict"].items()}
    before = torch.load(pruned / "best.ckpt", weights_only=True)["state_dict"]
    assert shapes == {name: value.shape for name, value in before.items()}
    assert last["epoch"] == 1

    gflow("validate", "--ckpt_path", "checkpoints/tuned/best.ckpt", *TINY)
    output = gflow("test", "--ckpt_path", "checkpoints/tuned/best.ckpt", "--base", str(base), "--name", "tested", *TINY)
    assert "Compression" in output
    assert "checkpoints/tested/layers.png" in output
    assert Path("checkpoints/tested/layers.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(Path("checkpoints/tested/report.json").read_text())["networks"]
    assert report["unpruned"]["macs"] == 228_267_008
    assert report["pruned"]["macs"] < report["unpruned"]["macs"]
    assert report["unpruned"]["test_accuracy"] is not None
    assert report["pruned"]["train_accuracy"] is not None
    assert report["pruned"]["compression"] > 1.5

    gflow(
        "predict", "--ckpt_path", "checkpoints/tuned/best.ckpt", "--name", "predicted", "--trainer.accelerator", "cpu"
    )
    predictions = rows_of(Path("checkpoints/predicted/predictions.csv"))
    assert len(predictions) == 355
    assert set(predictions[0]) == {"image", "class", "probability"}


RELOAD = """
import sys, torch
torch.set_num_threads(1)
from gflow_pl import ImageClassifier
module = ImageClassifier.load_from_checkpoint(sys.argv[1], weights_only=True, map_location="cpu").eval()
torch.save(module(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
"""


@pytest.mark.parametrize("network", sorted(MODELS))
def test_every_network_is_pruned_reloaded_in_a_new_process_and_tested(network, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--model.network",
        network,
        "--trainer.max_epochs",
        "3",
        "--pruning.fraction",
        "0.5",
        "--pruning.rounds",
        "2",
    ]
    assert main(["prune", *options, "--pruning.num_samples", "16", "--name", "run", *TINY]) == 0
    file = Path("checkpoints/run/last.ckpt")
    images = torch.randn(4, 3, 32, 32)
    torch.save(images, "images.pt")
    subprocess.run([sys.executable, "-c", RELOAD, file, "images.pt", "outputs.pt"], check=True)
    reloaded = ImageClassifier.load_from_checkpoint(file, weights_only=True).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(images), torch.load("outputs.pt", weights_only=True))
    assert main(["test", "--ckpt_path", str(file), "--name", "tested", *TINY]) == 0
    networks = json.loads(Path("checkpoints/tested/report.json").read_text())["networks"]
    assert networks["unpruned"]["test_accuracy"] is None, "the unpruned network was not measured"
    expected = networks["unpruned"]["filters"] - networks["unpruned"]["filters"] // 2
    assert abs(networks["pruned"]["filters"] - expected) <= 1
    assert networks["pruned"]["parameters"] == sum(p.numel() for p in reloaded.parameters())


def weights_of(path: str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_the_same_command_twice_is_the_same_run_and_another_seed_is_not(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.network", "vgg13", "--trainer.max_epochs", "3", "--pruning.rounds", "1", *TINY]
    options += ["--pruning.measure", "loss", "--pruning.num_samples", "16", "--data.num_workers", "0"]
    for name in ("one", "two"):
        assert main(["prune", *options, "--name", name]) == 0
    assert main(["prune", *options, "--name", "other", "--seed_everything", "1"]) == 0
    one, two, other = (weights_of(f"checkpoints/{name}/last.ckpt") for name in ("one", "two", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert Path("checkpoints/one/metrics.csv").read_bytes() == Path("checkpoints/two/metrics.csv").read_bytes()
    assert any(one[name].shape != other[name].shape or not torch.equal(one[name], other[name]) for name in one)


def test_fit_with_the_callback_in_its_settings_is_the_same_run_as_prune(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fit.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: gflow_pl.PruningCallback\n"
        "      init_args: {measure: loss, fraction: 0.5, rounds: 2, num_samples: 16}\n"
    )
    options = ["--model.network", "vgg13", "--trainer.max_epochs", "4", *TINY]
    pruning = [
        "--pruning.measure",
        "loss",
        "--pruning.fraction",
        "0.5",
        "--pruning.rounds",
        "2",
        "--pruning.num_samples",
        "16",
    ]
    assert main(["fit", "--config", "fit.yaml", *options, "--name", "fit"]) == 0
    assert main(["prune", *options, *pruning, "--name", "prune"]) == 0
    fit, prune = weights_of("checkpoints/fit/last.ckpt"), weights_of("checkpoints/prune/last.ckpt")
    assert fit.keys() == prune.keys()
    assert all(torch.equal(fit[name], prune[name]) for name in fit)
    assert (tmp_path / "checkpoints/fit/metrics.csv").read_bytes() == (
        tmp_path / "checkpoints/prune/metrics.csv"
    ).read_bytes()


@pytest.mark.filterwarnings("ignore:PruningCallback. training ended in epoch")
def test_a_resumed_run_equals_the_uninterrupted_run_and_contains_all_rows(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--model.network",
        "resnet56",
        "--pruning.fraction",
        "0.5",
        "--pruning.rounds",
        "2",
        "--pruning.num_samples",
        "16",
    ]
    assert main(["prune", *options, *TINY, "--trainer.max_epochs", "4", "--name", "whole"]) == 0
    shorter = ["--config", "stop.yaml"]
    Path("stop.yaml").write_text("trainer: {callbacks: [{class_path: stopper.Stopper}]}\n")
    Path("stopper.py").write_text(
        "from pytorch_lightning.callbacks import Callback\nclass Stopper(Callback):\n    def on_train_epoch_end(self, "
        "trainer, pl_module):\n        trainer.should_stop = trainer.current_epoch == 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["prune", *options, *TINY, *shorter, "--trainer.max_epochs", "4", "--name", "part"]) == 0
    resume = ["--ckpt_path", "checkpoints/part/last.ckpt", "--seed_everything", "7"]
    assert main(["prune", *options, *TINY, *resume, "--trainer.max_epochs", "4", "--name", "resumed"]) == 0
    whole, resumed = weights_of("checkpoints/whole/last.ckpt"), weights_of("checkpoints/resumed/last.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # A run that is resumed after its first cut cannot save the unpruned network itself: the file is copied.
    whole, resumed = weights_of("checkpoints/whole/unpruned.ckpt"), weights_of("checkpoints/resumed/unpruned.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    one, two = (rows_of(Path(f"checkpoints/{name}/metrics.csv")) for name in ("whole", "resumed"))
    assert one == two
    assert len(one) == 4


def test_fit_refuses_to_resume_a_pruning_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.network", "vgg13", *TINY]
    assert main(["prune", *options, "--trainer.max_epochs", "2", "--pruning.num_samples", "8", "--name", "run"]) == 0
    capsys.readouterr()
    assert main(["fit", *options, "--ckpt_path", "checkpoints/run/last.ckpt"]) == 2
    assert "resume it with gflow prune --ckpt_path checkpoints/run/last.ckpt" in capsys.readouterr().err


def test_a_run_never_overwrites_another(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["fit", "--model.network", "vgg13", "--trainer.max_epochs", "1", "--name", "run", *TINY]
    assert main(options) == 0
    before = {path: path.read_bytes() for path in Path("checkpoints/run").glob("*.*")}
    assert main(options) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "checkpoints/run-2/last.ckpt").is_file()

"""Commands with two processes use one run folder, and measure the same accuracies as one process."""

import json
import subprocess
import sys
from pathlib import Path

RANKS = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]


def gflow(*arguments: str) -> None:
    line = [sys.executable, "-m", "gflow_pl", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def networks_of(name: str) -> dict:
    return json.loads(Path(f"checkpoints/{name}/report.json").read_text())["networks"]


def test_finetune_and_test_with_two_processes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--data.batch_size", "16"]
    options = ["--model.network", "vgg13", "--trainer.max_epochs", "2", "--pruning.fraction", "0.7", *short]
    gflow("prune", *options, "--pruning.num_samples", "16", "--trainer.accelerator", "cpu", "--name", "pruned")
    gflow(
        "finetune",
        "--pretrained",
        "checkpoints/pruned/last.ckpt",
        "--trainer.max_epochs",
        "2",
        "--name",
        "tuned",
        *short,
        *RANKS,
    )
    assert len(Path("checkpoints/tuned/metrics.csv").read_text().splitlines()) == 1 + 2

    file = ["--ckpt_path", "checkpoints/tuned/last.ckpt"]
    gflow("test", *file, "--name", "two", "--data.batch_size", "64", *RANKS)
    gflow("test", *file, "--name", "one", "--data.batch_size", "64", "--trainer.accelerator", "cpu")
    assert networks_of("one") == networks_of("two")
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == ["one", "pruned", "tuned", "two"]

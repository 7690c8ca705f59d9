"""Ctrl-C ends a run cleanly, with its last checkpoint intact."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import torch


def interruptible() -> None:
    """Accept Ctrl-C in the process, which processes in the background of a shell ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_ends_a_run_cleanly_and_the_run_can_be_resumed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.network", "vgg13", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
    options += ["--data.batch_size", "8", "--trainer.accelerator", "cpu", "--pruning.num_samples", "16"]
    command = [sys.executable, "-m", "gflow_pl", "prune", *options]
    line = [*command, "--trainer.max_epochs", "500", "--name", "run"]
    run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=interruptible)
    metrics = Path("checkpoints/run/metrics.csv")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in output
    assert "checkpoints/run/last.ckpt" in output, "the command that resumes the run"
    assert not list(Path("checkpoints/run").glob(".*")), "no temporary file remains"

    last = torch.load("checkpoints/run/last.ckpt", weights_only=True)
    epochs = last["epoch"] + 1
    rest = ["--trainer.max_epochs", str(epochs + 1), "--ckpt_path", "checkpoints/run/last.ckpt", "--name", "rest"]
    done = subprocess.run([*command, *rest], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(Path("checkpoints/rest/metrics.csv").read_text().splitlines()) == 1 + epochs + 1

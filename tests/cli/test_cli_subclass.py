"""A pruning run whose callback is a subclass of PruningCallback, under `gflow fit`."""

from pathlib import Path

import torch

from gflow_pl.__main__ import main
from gflow_pl.callbacks import pruning_state_in

OPTIONS = ["--model.network", "vgg13", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
OPTIONS += ["--trainer.accelerator", "cpu", "--data.batch_size", "8"]


def test_the_run_is_recognised_when_it_is_resumed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_pruning.py").write_text(
        "from gflow_pl import PruningCallback\nclass Own(PruningCallback):\n    def should_prune(self, epoch):\n      "
        "  return epoch == 1\n"
    )
    Path("own.yaml").write_text(
        "trainer: {callbacks: [{class_path: own_pruning.Own, init_args: {num_samples: 8, fraction: 0.3}}]}\n"
    )
    with_callback = ["fit", *OPTIONS, "--config", "own.yaml"]
    assert main([*with_callback, "--trainer.max_epochs", "2", "--name", "run"]) == 0
    checkpoint = Path("checkpoints/run/last.ckpt")
    state = pruning_state_in(torch.load(checkpoint, weights_only=True))
    assert state is not None
    assert [row["epoch"] for row in state["rows"]] == [1]

    # Without the callback, the run cannot go on.
    capsys.readouterr()
    assert main(["fit", *OPTIONS, "--ckpt_path", str(checkpoint), "--trainer.max_epochs", "3"]) == 2
    assert f"resume it with gflow prune --ckpt_path {checkpoint}" in capsys.readouterr().err

    # With it, the file of the unpruned network is copied into the new folder.
    resumed = [*with_callback, "--ckpt_path", str(checkpoint), "--trainer.max_epochs", "3", "--name", "resumed"]
    assert main(resumed) == 0
    assert Path("checkpoints/resumed/unpruned.ckpt").read_bytes() == Path("checkpoints/run/unpruned.ckpt").read_bytes()

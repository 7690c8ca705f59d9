"""The commands and the code of the README run as written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def code_block(name: str) -> str:
    """Return the code block of the README that follows ``<!-- test: name -->``."""
    found = re.search(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no code block '{name}'"
    return found.group(1)


def run_commands(block: str, folder: Path, extra: dict[str, list[str]]) -> None:
    """Run every command of a code block in a folder; `extra` has options by command that keep the test short."""
    commands = [shlex.split(line) for line in block.splitlines() if line.startswith("gflow ")]
    assert commands
    for _, command, *options in commands:
        line = [sys.executable, "-m", "gflow_pl", command, *options, *extra.get(command, [])]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


SHORT = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]


def test_the_commands_run(tmp_path) -> None:
    extra = {"fit": SHORT, "prune": [*SHORT, "--pruning.num_samples", "128"], "finetune": SHORT}
    extra["test"] = ["--trainer.limit_test_batches", "1"]
    run_commands(code_block("commands"), tmp_path, extra)
    assert (tmp_path / "checkpoints" / "tuned" / "best.ckpt").is_file()
    assert list(tmp_path.glob("checkpoints/*/predictions.csv"))


def test_the_ddp_command_runs(tmp_path) -> None:
    run_commands(code_block("ddp"), tmp_path, {"prune": [*SHORT, "--pruning.num_samples", "128"]})
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["ddp"], "all ranks share one run folder"
    rows = (tmp_path / "checkpoints/ddp/pruning.csv").read_text().splitlines()
    assert len(rows) == 1 + 2


def test_the_callback_prunes_a_custom_module(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sys.path.insert(0, str(Path(__file__).parent / "callbacks"))
    import pytorch_lightning as pl
    from small_nets import SmallModule, images
    from torch.utils.data import DataLoader

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(images(32), batch_size=16, shuffle=True)

    names: dict = {}
    exec(code_block("callback"), names)
    module = SmallModule()
    before = sum(p.numel() for p in module.parameters())
    names["train_and_prune"](module, Data())
    assert sum(p.numel() for p in module.parameters()) < before


def test_the_steps_prune_a_torchvision_network(capsys) -> None:
    import torch
    import torchvision

    import gflow_pl

    names: dict = {}
    exec(code_block("network"), names)
    fresh = torchvision.models.mobilenet_v3_small()
    before = sum(p.numel() for p in fresh.parameters())
    gflow_pl.apply_structure(fresh, names["structure"])
    fresh.load_state_dict(names["model"].state_dict())
    images = torch.randn(2, 3, 224, 224)
    assert torch.equal(fresh.eval()(images), names["model"].eval()(images))
    assert sum(p.numel() for p in fresh.parameters()) < 0.8 * before
    assert "features.0.0" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_makefile_has_both_commands(target) -> None:
    assert f"make {target}" in README
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)

"""Bad input ends in one sentence and a non-zero exit status, before anything is started or overwritten."""

import pickle
from pathlib import Path

import pytest
import torch
from real_images import write_image_folder

from gflow_pl.__main__ import main
from gflow_pl.tasks import ImageClassifier

SMALL = ["--model.network", "vgg13", "--trainer.max_epochs", "4", "--trainer.accelerator", "cpu"]


class Code:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self):
        return print, ("this must never be printed",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and return its error message."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status not in (0, None)
    assert "Traceback" not in captured.err
    assert "this must never be printed" not in captured.out
    lines = [line for line in captured.err.splitlines() if line.startswith("gflow")]
    assert len(lines) == 1, captured.err
    assert not list(Path("checkpoints").glob("*")), "the run must not start"
    return lines[0]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model.network", "resnet57"], ["Unknown network 'resnet57'", "Did you mean 'resnet56'?"]),
        ([*SMALL, "--pruning.measure", "magnitud"], ["Unknown measure 'magnitud'", "Did you mean 'magnitude'?"]),
        ([*SMALL, "--pruning.fraction", "75"], ["`fraction` must be in (0, 1)", "for 75 % write 0.75"]),
        ([*SMALL, "--pruning.rounds", "0"], ["`rounds`", "at least 1"]),
        ([*SMALL, "--pruning.rounds", "9"], ["set max_epochs to at least 10"]),
        ([*SMALL, "--pruning.num_samples", "0"], ["`num_samples`"]),
        ([*SMALL, "--pruning.fractoin", "0.5"], ["fractoin"]),
        ([*SMALL, "--data", "ImageFolder", "--data.root", "nowhere"], ["there is no folder 'nowhere'"]),
        ([*SMALL, "--data", "CIFAR10", "--data.root", "nowhere"], ["download"]),
        ([*SMALL, "--config", "dmeo"], ["Did you mean 'demo'?"]),
        ([*SMALL, "--model.pretrained", "nowhere.ckpt"], ["nowhere.ckpt"]),
        ([*SMALL, "--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt"]),
        ([*SMALL, "--trainer.max_epochs", "four"], ["`trainer.max_epochs`: expected int, got four"]),
        ([*SMALL, "--pruning.residual", "shrink"], ["`pruning.residual`: expected ['expand', 'remove'], got shrink"]),
        ([*SMALL, "--data", "Digit"], ["Did you mean 'Digits'?"]),
        ([*SMALL, "--seed_everything", "-4"], ["-4 is not in bounds"]),
        ([*SMALL, "--trainer.strategy", "ddq"], ["strategy='ddq'"]),
        ([*SMALL, "--name", "../elsewhere"], ["`--name` must be the name of one folder"]),
        (["--model.network", "torch.nn.ReLU"], ["ReLU has no weights"]),
        (
            [
                "--model.network",
                "{class_path: torch.nn.Conv2d, init_args: {in_channels: 3, out_channels: 4, kernel_size: 3}}",
            ],
            ["Conv2d gives shape (2, 4, 30, 30)", "expected logits (2, 10)"],
        ),
        (
            ["--model.network", "{class_path: torch.nn.Linear, init_args: {in_features: 3, out_features: 4}}"],
            ["Linear does not run on images of 3x32x32"],
        ),
        ([*SMALL, "--out", "/proc/nowhere"], ["/proc/nowhere", "cannot be written"]),
        ([*SMALL, "--trainer.callbacks", "gflow_pl.PruningCallback"], ["two of these callbacks", "keep one"]),
        ([*SMALL, "--trainer.devices", "2", "--trainer.strategy", "ddp_spawn"], ["use strategy='ddp'"]),
        ([*SMALL, "--trainer.devices", "2", "--trainer.strategy", "ddp_notebook"], ["use strategy='ddp'"]),
        (
            [*SMALL, "--trainer.devices", "2", "--trainer.strategy", "ddp_notebook", "--trainer.fast_dev_run", "true"],
            ["use strategy='ddp'"],
        ),
        ([*SMALL, "--pruning.ignore", "[features.99]"], ["'features.99'", "Did you mean"]),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, parts, folder, capsys) -> None:
    sentence = refused(["prune", *options], capsys)
    for part in parts:
        assert part in sentence


def test_predict_refuses_several_processes(folder, capsys) -> None:
    ranks = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    sentence = refused(["predict", "--model.network", "vgg13", *ranks], capsys)
    assert "set --trainer.devices 1" in sentence


def test_an_image_folder_without_test_images_is_refused(folder, capsys) -> None:
    write_image_folder(folder / "images")
    (folder / "images" / "test").rename(folder / "images" / "elsewhere")
    sentence = refused(["prune", *SMALL, "--data", "ImageFolder", "--data.root", "images"], capsys)
    assert "has no test/" in sentence


def test_an_unknown_key_in_a_settings_file_is_refused(folder, capsys) -> None:
    (folder / "mine.yaml").write_text("pruning: {fractoin: 0.5}\n")
    assert "fractoin" in refused(["prune", *SMALL, "--config", "mine.yaml"], capsys)


@pytest.mark.parametrize("option", ["--model.pretrained", "--ckpt_path"])
def test_files_other_than_checkpoints_are_refused(option, folder, capsys) -> None:
    whole = folder / "whole.ckpt"
    torch.save({"state_dict": ImageClassifier("vgg13").state_dict()}, whole)
    (folder / "short.ckpt").write_bytes(whole.read_bytes()[:5000])
    (folder / "garbage.ckpt").write_bytes(b"not a checkpoint at all")
    (folder / "code.ckpt").write_bytes(pickle.dumps({"state_dict": Code()}))
    torch.save({"state_dict": Code()}, folder / "code_zip.ckpt")
    before = {path.name: path.read_bytes() for path in folder.glob("*.ckpt")}
    for name in ("short", "garbage", "code", "code_zip"):
        assert f"{name}.ckpt" in refused(["prune", *SMALL, option, f"{name}.ckpt"], capsys)
    assert {path.name: path.read_bytes() for path in folder.glob("*.ckpt")} == before


def test_a_checkpoint_of_another_network_is_refused(folder, capsys) -> None:
    torch.save({"state_dict": ImageClassifier("mobilenet_v1").state_dict()}, folder / "other.ckpt")
    sentence = refused(["prune", *SMALL, "--model.pretrained", "other.ckpt"], capsys)
    assert "holds another network" in sentence


def test_a_file_for_other_classes_is_refused(folder, capsys) -> None:
    other = ImageClassifier("vgg13", num_classes=7)
    saved = {"state_dict": other.state_dict(), "hyper_parameters": dict(other.hparams)}
    torch.save({**saved, "pytorch-lightning_version": "2.6.0"}, folder / "seven.ckpt")
    assert "gives shape (2, 7)" in refused(["prune", *SMALL, "--model.pretrained", "seven.ckpt"], capsys)
    for command in ("fit", "test", "predict"):
        sentence = refused([command, "--ckpt_path", "seven.ckpt"], capsys)
        assert "is of a network for 7 classes, but the data has 10" in sentence


def test_a_missing_file_of_the_unpruned_network_is_refused_before_testing(folder, capsys) -> None:
    sentence = refused(["test", "--model.network", "vgg13", "--base", "nowhere.ckpt"], capsys)
    assert "'nowhere.ckpt' does not exist" in sentence


def test_finetune_without_a_file_is_refused(folder, capsys) -> None:
    assert "give --model.pretrained FILE" in refused(["finetune", *SMALL], capsys)

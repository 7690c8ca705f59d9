"""Commands that train for one epoch on the images of every data module."""

from pathlib import Path

import pytest
from real_images import write_cifar10, write_cifar100, write_image_folder

from gflow_pl.__main__ import main

OPTIONS = [
    "--trainer.max_epochs",
    "1",
    "--trainer.accelerator",
    "cpu",
    "--data.batch_size",
    "10",
    "--data.num_workers",
    "0",
]


def test_an_epoch_on_cifar_from_files_in_the_formats_of_torchvision(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "data", monkeypatch)
    write_cifar100(tmp_path / "data", monkeypatch)
    for name in ("CIFAR10", "CIFAR100"):
        assert (
            main(["fit", "--model.network", "vgg13", "--data", name, "--data.root", "data", *OPTIONS, "--name", name])
            == 0
        )
        assert Path(f"checkpoints/{name}/best.ckpt").is_file()


@pytest.mark.parametrize("size", [32, 64])
def test_an_epoch_on_an_image_folder_with_the_classes_that_it_contains(size, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "images", num_classes=4, scale=size // 32)
    options = ["--data", "ImageFolder", "--data.root", "images", "--data.image_size", str(size)]
    assert main(["fit", "--model.network", "resnet18", *options, *OPTIONS, "--name", "run"]) == 0
    config = Path("checkpoints/run/config.yaml").read_text()
    assert f"image_size: {size}" in config


def test_images_too_small_for_a_network_are_refused_before_training(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "images", num_classes=2)
    options = ["--data", "ImageFolder", "--data.root", "images", "--data.image_size", "8"]
    assert main(["fit", "--model.network", "vgg13", *options, *OPTIONS]) == 2
    assert "too small" in capsys.readouterr().err
    assert not Path("checkpoints").exists()

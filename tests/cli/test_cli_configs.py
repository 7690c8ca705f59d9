"""Every shipped settings file is valid for the signatures of the classes that it configures."""

import re
from pathlib import Path

import pytest
import yaml

from gflow_pl.__main__ import main
from gflow_pl.cli.configs import config_folder, with_config_paths
from gflow_pl.files import read_rows

CONFIGS = sorted(config_folder().glob("*.yaml"))
NETWORK_AND_DATA = re.compile(r"[a-z]+_(.+)_([a-z0-9]+)")
DATA = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "digits": "Digits", "folder": "ImageFolder"}


def test_every_promised_settings_file_exists() -> None:
    names = {path.stem for path in CONFIGS}
    expected = {
        f"{command}_{network}_{data}"
        for command in ("fit", "prune", "finetune")
        for network in ("vgg13", "mobilenet_v1", "resnet56")
        for data in ("cifar10", "cifar100")
    }
    assert expected | {"demo", "prune_vgg13_folder"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_settings_file_is_valid_and_configures_what_its_name_says(path, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = "prune" if path.stem == "demo" else path.stem.split("_")[0]
    with pytest.raises(SystemExit) as stop:
        main([command, "--config", path.stem, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    settings = yaml.safe_load(printed)
    network, data = NETWORK_AND_DATA.fullmatch(path.stem).groups() if path.stem != "demo" else ("resnet56", "digits")
    assert settings["model"]["init_args"]["network"] == network
    assert settings["data"]["class_path"] == f"gflow_pl.data.{DATA[data]}"


def test_a_file_in_the_working_directory_takes_precedence_over_a_shipped_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_config_paths(["prune", "--config", "demo"])[-1] == str(config_folder() / "demo.yaml")
    assert with_config_paths(["prune", "--config=demo.yaml"])[-1] == f"--config={config_folder() / 'demo.yaml'}"
    (tmp_path / "demo").write_text("{}")
    assert with_config_paths(["prune", "--config", "demo"])[-1] == "demo"


def test_a_25_round_run_reaches_75_percent_to_within_one_unit(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--data",
        "Digits",
        "--data.batch_size",
        "8",
        "--trainer.accelerator",
        "cpu",
        "--trainer.max_epochs",
        "26",
    ]
    limits = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0", "--pruning.num_samples", "8"]
    settings = Path("own.yaml")
    shipped = (config_folder() / "prune_resnet56_cifar10.yaml").read_text()
    settings.write_text(
        shipped.replace("parts/", f"{config_folder()}/parts/").replace(
            f"data: {config_folder()}/parts/cifar10.yaml", ""
        )
    )
    assert main(["prune", "--config", str(settings), *options, *limits, "--name", "run"]) == 0
    rows = read_rows("checkpoints/run/pruning.csv")
    assert len(rows) == 25
    assert abs(rows[-1]["filters_left"] - 2128 // 4) <= 1

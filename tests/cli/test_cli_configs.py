"""Every shipped settings file is parsed against the real signatures."""

from pathlib import Path

import pytest

from gflow_pl.__main__ import main
from gflow_pl.cli.configs import config_folder, with_config_paths
from gflow_pl.files import read_rows

CONFIGS = sorted(config_folder().glob("*.yaml"))


def test_the_promised_settings_files_are_there() -> None:
    names = {path.stem for path in CONFIGS}
    wanted = {
        f"{command}_{network}_{data}"
        for command in ("fit", "prune", "finetune")
        for network in ("vgg13", "mobilenet_v1", "resnet56")
        for data in ("cifar10", "cifar100")
    }
    assert wanted | {"demo", "prune_vgg13_folder"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_settings_file_fits_the_real_signatures(path, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = "prune" if path.stem == "demo" else path.stem.split("_")[0]
    with pytest.raises(SystemExit) as stop:
        main([command, "--config", path.stem, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for word in path.stem.split("_")[1:2]:
        assert f"network: {word}" in printed or "mobilenet_v1" in printed


def test_a_file_in_the_working_folder_wins_over_a_shipped_one(tmp_path: Path, monkeypatch) -> None:
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
    settings = Path("mine.yaml")
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

"""The classes of model and data are found before the command line is parsed, so that one parse is enough."""

from pathlib import Path

import pytest
import pytorch_lightning as pl

from gflow_pl import data  # noqa: F401 - makes the short names of the data modules known
from gflow_pl.__main__ import main
from gflow_pl.cli.default_classes import chosen_class_paths, full_class_path

BASES = {"model": pl.LightningModule, "data": pl.LightningDataModule}
OWN = """
import pytorch_lightning as pl


class Module(pl.LightningModule):
    def __init__(self, lr: float = 0.125, width: int = 3) -> None:
        super().__init__()


class Other(pl.LightningModule):
    def __init__(self, lr: float = 0.25, width: int = 3) -> None:
        super().__init__()


def make_module(lr: float = 0.5) -> Module:
    return Module(lr)
"""


@pytest.fixture(autouse=True)
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_classes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ([], {}),
        (["--model.network", "vgg13", "--trainer.max_epochs", "4"], {}),
        (["--model", "own_classes.Module"], {"model": "own_classes.Module"}),
        (["--model=own_classes.Module"], {"model": "own_classes.Module"}),
        (["--model.class_path", "own_classes.Module"], {"model": "own_classes.Module"}),
        (["--model", "own_classes.make_module"], {"model": "own_classes.make_module"}),
        (
            ["--model", '{"class_path": "own_classes.Module", "init_args": {"width": 4}}'],
            {"model": "own_classes.Module"},
        ),
        (["--model", "own_classes.Module", "--model", "own_classes.Other"], {"model": "own_classes.Other"}),
        (["--data", "CIFAR10"], {"data": "CIFAR10"}),
        (["--config", "both.yaml"], {"model": "own_classes.Other", "data": "Digits"}),
        (["-c", "both.yaml", "--data", "CIFAR10"], {"model": "own_classes.Other", "data": "CIFAR10"}),
        (["--config=folder/parts.yaml"], {"model": "own_classes.Module"}),
        (["--model", "folder/module.yaml"], {"model": "own_classes.Module"}),
        # The parser reports these.
        (["--model", "own_classes.Modul"], {}),
        (["--data", "Digit", "--config", "nowhere.yaml"], {}),
        (["--config", "broken.yaml", "--model"], {}),
    ],
)
def test_the_last_class_that_is_given_is_chosen(arguments: list[str], chosen: dict[str, str]) -> None:
    Path("both.yaml").write_text("model: {class_path: own_classes.Other}\ndata: Digits\n")
    Path("broken.yaml").write_text("model: [1, {\n")
    Path("folder").mkdir()
    Path("folder/parts.yaml").write_text("model: module.yaml\n")
    Path("folder/module.yaml").write_text("class_path: own_classes.Module\ninit_args: {width: 5}\n")
    assert chosen_class_paths(arguments, BASES) == chosen


def printed_settings(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_settings_are_printed_with_the_defaults_of_the_chosen_class(capsys) -> None:
    printed = printed_settings(capsys, "--model", "own_classes.Module")
    assert "lr: 0.125\n" in printed
    assert "milestones" not in printed


def test_options_of_the_default_classes_need_no_class(capsys) -> None:
    printed = printed_settings(capsys, "--model.lr", "0.3", "--data.batch_size", "7")
    assert "class_path: gflow_pl.ImageClassifier" in printed
    assert "lr: 0.3\n" in printed
    assert "batch_size: 7\n" in printed


def test_a_class_has_one_full_path() -> None:
    assert full_class_path("gflow_pl.ImageClassifier") == "gflow_pl.tasks.classification.ImageClassifier"
    assert full_class_path("no.such.Class") == "no.such.Class"

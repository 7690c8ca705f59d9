"""Errors that the user can correct are one sentence; every other error is a bug and keeps its traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from gflow_pl.__main__ import COMMANDS, main
from gflow_pl.cli.parser import condense
from gflow_pl.cli.trainer import GflowTrainer

TINY = ["--model.network", "vgg13", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
TINY += ["--trainer.limit_val_batches", "0", "--data.batch_size", "8", "--trainer.accelerator", "cpu"]
OWN = """
import pytorch_lightning as pl

from gflow_pl.common.errors import SettingsError


class Bug(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        raise ValueError("a bug of mine")


class Rejects(pl.Callback):
    def __init__(self, width: int = 3) -> None:
        raise ValueError("`width` is too large")


class BuggyConstructor(pl.Callback):
    def __init__(self, width: int = 3) -> None:
        raise KeyError("width")


class Data(pl.LightningDataModule):
    @property
    def num_classes(self):
        raise SettingsError("give the names of the classes")
"""


@pytest.fixture(autouse=True)
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_errors.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def test_a_bug_keeps_its_traceback_and_ends_with_how_to_report_it() -> None:
    line = [sys.executable, "-m", "gflow_pl", "fit", *TINY, "--trainer.callbacks", "own_errors.Bug"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a bug of mine" in done.stderr.splitlines()[-2]
    assert "report it in the issue tracker" in done.stderr.splitlines()[-1]
    assert not list(Path("checkpoints").iterdir()), "the folder of a run that failed early is removed"


def test_an_error_of_a_constructor_that_is_not_about_its_arguments_is_a_bug() -> None:
    with pytest.raises(KeyError, match="width") as raised:
        main(["fit", *TINY, "--trainer.callbacks", "own_errors.BuggyConstructor"])
    assert "report it" in raised.value.__notes__[-1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--trainer.callbacks", "own_errors.Rejects"], "gflow fit: Rejects: `width` is too large\n"),
        (["--data", "own_errors.Data"], "gflow fit: give the names of the classes\n"),
        (["--model.network", "resnet57"], "gflow fit: "),
    ],
)
def test_only_the_sentence_of_the_error_is_printed(options, sentence, capsys) -> None:
    assert main(["fit", "--trainer.accelerator", "cpu", *options]) == 2
    messages = [line for line in capsys.readouterr().err.splitlines(keepends=True) if line.startswith("gflow")]
    assert len(messages) == 1
    assert messages[0].startswith(sentence)
    assert "Namespace" not in messages[0]


def test_a_trainer_that_cannot_be_built_is_one_sentence(capsys) -> None:
    assert main(["fit", *TINY, "--trainer.barebones", "true"]) == 2
    assert "gflow fit: `Trainer(barebones=True" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["test", "predict"])
def test_commands_that_write_a_file_refuse_fast_dev_run(command, capsys) -> None:
    assert main([command, "--model.network", "vgg13", "--trainer.fast_dev_run", "true"]) == 2
    assert f"{command} writes a file" in capsys.readouterr().err


def test_the_command_line_of_the_process_stays_as_it_is(capsys) -> None:
    before = list(sys.argv)
    assert main(["finetune", *TINY]) == 2
    assert sys.argv == before


SCRIPT = """
import sys
from gflow_pl.__main__ import main

ranks = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
sys.exit(main(["fit", *{options!r}, *ranks, "--name", sys.argv[1]]))
"""


def test_a_script_with_arguments_of_its_own_trains_with_two_ranks() -> None:
    Path("script.py").write_text(SCRIPT.format(options=TINY))
    done = subprocess.run(
        [sys.executable, "script.py", "mine"], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in Path("checkpoints").iterdir()] == ["mine"]
    assert Path("checkpoints/mine/last.ckpt").is_file()


def test_every_summary_is_the_first_line_of_the_help_of_its_command() -> None:
    for command, summary in COMMANDS.items():
        assert getattr(GflowTrainer, command).__doc__.splitlines()[0] == summary


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("Parser key \"trainer.max_epochs\":\n  Expected a <class 'int'>. Got value: four", None),
        ("Option 'netwrok' is not accepted", "Option 'netwrok' is not accepted. Did you mean 'network'?"),
        (
            "Does not validate against any of the Union subtypes\nErrors:\n  - Expected a <class 'NoneType'>\n"
            "  - there is no folder 'x'\nGiven value type: <class 'str'>\nGiven value: Digit",
            "there is no folder 'x', got Digit. Did you mean 'Digits'?",
        ),
    ],
)
def test_messages_of_jsonargparse_are_condensed(message, sentence) -> None:
    expected = sentence or "`trainer.max_epochs`: expected int, got four"
    assert condense(message, ["network", "Digits", "trainer.max_epochs"]) == expected

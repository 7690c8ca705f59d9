"""The package as a whole: lazy imports, fast answers of the command, one source for the version."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gflow_pl
from gflow_pl.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent


def test_every_public_name_can_be_imported() -> None:
    for name in gflow_pl.__all__:
        assert getattr(gflow_pl, name) is not None
    assert set(gflow_pl.__all__) <= set(dir(gflow_pl))


def test_an_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gflow_pl.no_such_name


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["prunee"]])
def test_help_and_version_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; from gflow_pl.__main__ import main; status = main({arguments!r}); "
        "assert 'torch' not in sys.modules and 'pytorch_lightning' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if arguments == ["prunee"] else 0), done.stderr


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, gflow_pl; assert not {'torch', 'numpy', 'pytorch_lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command, summary in COMMANDS.items():
        assert command in text
        assert summary in text


def test_an_unknown_command_is_reported_in_one_sentence_with_the_closest_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prun", "--config", "x"]) == 2
    assert capsys.readouterr().err == (
        f"gflow: unknown command 'prun'. Known: {', '.join(COMMANDS)}. Did you mean 'prune'?\n"
    )


def test_the_version_has_one_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert "version" not in project

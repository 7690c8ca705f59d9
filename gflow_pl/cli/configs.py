"""Find settings files by name."""

from __future__ import annotations

import difflib
from pathlib import Path

import gflow_pl
from gflow_pl.common.errors import SettingsError

__all__ = ["config_folder", "with_config_paths"]


def config_folder() -> Path:
    """Return the folder of shipped settings files: in the installed package, or beside the package in a checkout."""
    package = Path(gflow_pl.__file__).parent
    installed, checkout = package / "configs", package.parent / "configs"
    return installed if installed.is_dir() else checkout


def with_config_paths(arguments: list[str]) -> list[str]:
    """Replace the name of a shipped settings file after ``--config`` or ``-c`` by its path.

    A file of that name in the working directory takes precedence.

    Raises:
        SettingsError: Neither such a file nor a shipped one exists.
    """
    result = list(arguments)
    for position, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option not in ("--config", "-c"):
            continue
        if value:
            result[position] = f"{option}={_config_path(value)}"
        elif position + 1 < len(arguments):
            result[position + 1] = _config_path(arguments[position + 1])
    return result


def _config_path(name: str) -> str:
    """Return the path of a settings file that is given by its path or by the name of a shipped one."""
    if Path(name).is_file():
        return name
    shipped = {path.stem: path for path in sorted(config_folder().glob("*.yaml"))}
    stem = name.removesuffix(".yaml")
    if stem in shipped and "/" not in stem:
        return str(shipped[stem])
    close = difflib.get_close_matches(stem, shipped, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise SettingsError(
        f"There is no settings file '{name}', neither at that path nor among the shipped ones: "
        f"{', '.join(shipped)}.{hint}"
    )

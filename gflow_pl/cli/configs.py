"""Settings files that are found by name."""

from __future__ import annotations

import difflib
from pathlib import Path

import gflow_pl

__all__ = ["config_folder", "with_config_paths"]


def config_folder() -> Path:
    """Where the shipped settings files are: in the installed package, or beside it in a checkout."""
    package = Path(gflow_pl.__file__).parent
    inside, beside = package / "configs", package.parent / "configs"
    return inside if inside.is_dir() else beside


def with_config_paths(arguments: list[str]) -> list[str]:
    """Replace the name of a shipped settings file after ``--config`` by its path.

    A file of that name in the working folder wins.

    Raises:
        ValueError: There is neither a file nor a shipped one of that name.
    """
    result = list(arguments)
    for position, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option not in ("--config", "-c"):
            continue
        if value:
            result[position] = f"{option}={_path_of(value)}"
        elif position + 1 < len(arguments):
            result[position + 1] = _path_of(arguments[position + 1])
    return result


def _path_of(name: str) -> str:
    if Path(name).is_file():
        return name
    shipped = {path.stem: path for path in sorted(config_folder().glob("*.yaml"))}
    stem = name.removesuffix(".yaml")
    if stem in shipped and "/" not in stem:
        return str(shipped[stem])
    close = difflib.get_close_matches(stem, shipped, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(
        f"There is no settings file '{name}', and none of that name is shipped. Known: {', '.join(shipped)}.{hint}"
    )

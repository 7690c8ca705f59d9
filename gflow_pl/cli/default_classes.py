"""Find the classes of model and data that a command line chooses, before the command line is parsed."""

from __future__ import annotations

import pydoc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

__all__ = ["chosen_class_paths", "full_class_path"]


def chosen_class_paths(arguments: Sequence[str], base_classes: Mapping[str, type]) -> dict[str, str]:
    """Return the class path that the arguments choose for every key, such as ``model`` and ``data``.

    The defaults of the parser must name these classes before it parses: jsonargparse fills in the default class with
    all its default values first, and a class that is chosen later would inherit the values of equal name.

    Values are searched where the parser finds them: ``--model CLASS``, ``--model FILE``, ``--model.class_path CLASS``
    and settings files after ``--config``, the last one first. What cannot be read or imported is left to the parser to
    report.

    Args:
        arguments: The command line, with the paths of settings files.
        base_classes: Key to the class that a chosen class must inherit from.

    Returns:
        Key to class path. Keys for which nothing valid is chosen are missing.
    """
    chosen = {}
    for option, value in _options(arguments):
        name, _, rest = option.removeprefix("--").partition(".")
        paths: dict[str, str | None] = {}
        if option in ("--config", "-c"):
            settings, folder = _read_yaml(Path(value)), Path(value).parent
            if isinstance(settings, dict):
                paths = {key: _class_path(settings.get(key), folder) for key in base_classes}
        elif name in base_classes and rest in ("", "class_path"):
            paths = {name: _class_path(value, Path())}
        for key, path in paths.items():
            if path is not None and _is_importable(path, base_classes[key]):
                chosen[key] = path
    return chosen


def full_class_path(path: str) -> str:
    """Return the path of a class in the module that defines it, for any path that it can be imported by."""
    found = _locate(path)
    return f"{found.__module__}.{found.__qualname__}" if isinstance(found, type) else path


def _is_importable(path: str, base: type) -> bool:
    """Return whether a path refers to a class or function, or a name to a known subclass of `base`."""
    if "." in path:
        return callable(_locate(path))
    return any(cls.__name__ == path for cls in _subclasses(base))


def _locate(path: str) -> object | None:
    try:
        return pydoc.locate(path)
    except pydoc.ErrorDuringImport:
        return None


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield every option with its value, for ``--option value`` and ``--option=value``."""
    for position, argument in enumerate(arguments):
        option, separator, value = argument.partition("=")
        if separator:
            yield option, value
        elif position + 1 < len(arguments):
            yield option, arguments[position + 1]


def _class_path(value: object, folder: Path) -> str | None:
    """Return the class path in a setting: a class path, a mapping with one (perhaps as text), or the path of a file."""
    if isinstance(value, str) and (folder / value).is_file():
        return _class_path(_read_yaml(folder / value), (folder / value).parent)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _parse_yaml(value)
    if isinstance(value, dict):
        value = value.get("class_path")
    return value if isinstance(value, str) else None


def _read_yaml(path: Path) -> object:
    try:
        return _parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError):
        return None


def _parse_yaml(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _subclasses(base: type) -> set[type]:
    """Return all subclasses that have been imported."""
    direct: set[type] = set(base.__subclasses__())
    return direct.union(*(_subclasses(cls) for cls in direct))

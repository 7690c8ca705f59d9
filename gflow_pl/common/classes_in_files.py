"""Decide which classes a file may name: a checkpoint's hyperparameters must not decide what code runs."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Container, Iterator, Mapping
from typing import Any

from gflow_pl.common.errors import SettingsError

__all__ = ["check_hyperparameters", "network_from_file"]

_HYPERPARAMETER_KEYS = ("hparams", "module_arguments", "hyper_parameters")  # the first two: of early Lightning releases
_FETCHES = re.compile(r"weights|pretrain|download", re.IGNORECASE)
_NAMES_A_FILE = re.compile(r"checkpoint|path|file|url|cache|hub|dir|config|cfg", re.IGNORECASE)
_PLACE = re.compile(r"[:/\\\0]")
_MAX_DEPTH = 8


def check_hyperparameters(checkpoint: object, path: object, given: Container[str]) -> None:
    """Raise if the hyperparameters in a file name a class that is not built from files.

    Nothing is imported to find that out, apart from torchvision and timm.

    Args:
        checkpoint: Contents of a file; only a Lightning checkpoint has hyperparameters.
        path: The file, for the message.
        given: Names of the hyperparameters that are not taken from the file.

    Raises:
        SettingsError: A hyperparameter of the file names such a class, or gives a builder an argument that could read
            a file or fetch weights.
    """
    if not isinstance(checkpoint, Mapping):
        return
    for key in _HYPERPARAMETER_KEYS:
        saved = checkpoint.get(key)
        for name, value in saved.items() if isinstance(saved, Mapping) else ():
            if name in given:
                continue
            for description in [value] if name == "network" else _class_descriptions(value):
                _check(description, name, path)


def network_from_file(network: object, path: object) -> Any:
    """Return the description of a network in a file, if it can be built without trust in the file.

    Args:
        network: The description: a name, a class path, or a dict with a class path and its arguments.
        path: The file, for the message.

    Returns:
        The description, with the arguments that keep the builder from fetching weights.

    Raises:
        SettingsError: The description names another class, or gives a builder an argument that could read a file or
            fetch weights.
    """
    _check(network, "network", path)
    return _without_downloads(network)


def _check(description: object, name: str, path: object) -> None:
    """Raise if a description of an object is not harmless."""
    reason = _reason_against(description)
    if reason is not None:
        raise SettingsError(
            f"'{path}': its hyperparameter `{name}` {reason}. From a file only networks of this package and model "
            "builders of torchvision and timm are built, with plain arguments. If you trust the file, name the value "
            f"again (--model.{name} in a command, {name}=... in Python), or give --trust_file true (trust_file=True)."
        )


def _reason_against(description: object) -> str | None:
    """Return why a description of an object is not followed, or None if it is harmless."""
    if isinstance(description, str) and "." not in description:
        return None  # a network of this package
    spec: Mapping[Any, Any] = {"class_path": description} if isinstance(description, str) else description  # type: ignore[assignment]
    if not isinstance(spec, Mapping) or "class_path" not in spec:
        return None  # nothing that could be imported: whoever builds the network says what is wrong with it
    class_path = spec["class_path"]
    if not isinstance(class_path, str) or _builder(class_path) is None:
        return f"names the class {class_path!r}"

    # Arguments.
    for key in ("init_args", "dict_kwargs"):
        arguments = spec.get(key) or {}
        if not isinstance(arguments, Mapping):
            return f"gives {class_path} arguments that are no dict"
        for name, value in arguments.items():
            if not isinstance(name, str) or not _is_plain(value) or _may_read(name, value):
                return f"gives {class_path} the argument {name}={value!r:.80}"
    return None


def _builder(class_path: str) -> Any:
    """Return the model builder of torchvision or timm at a class path, or None if it is something else."""
    module_name, _, name = class_path.rpartition(".")
    package = module_name.partition(".")[0]
    if package not in ("torchvision", "timm") or not f"{module_name}.".startswith(("torchvision.models.", "timm.")):
        return None
    try:
        models = importlib.import_module(f"{package}.models")
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError):
        return None
    if package == "timm":
        is_known = found is models.create_model or models.is_model(name)
    else:
        is_known = name in models.list_models()
    defined_in = getattr(found, "__module__", "")
    return found if is_known and callable(found) and f"{defined_in}.".startswith(f"{package}.") else None


def _may_read(name: str, value: object) -> bool:
    """Return whether an argument of a builder could make it read a file or fetch weights."""
    if _FETCHES.search(name):
        return value is not None and value is not False
    return bool(_NAMES_A_FILE.search(name)) and not isinstance(value, (bool, int, float, type(None)))


def _is_plain(value: object, depth: int = 0) -> bool:
    """Return whether a value is a number, a word, or a list or dict of these, and names no class and no place."""
    if value is None or isinstance(value, (bool, int, float)):
        return True
    if isinstance(value, str):
        return not _PLACE.search(value)
    if depth == _MAX_DEPTH:
        return False
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, Mapping):
        return "class_path" not in value and all(
            isinstance(key, str) and _is_plain(item, depth + 1) for key, item in value.items()
        )
    return False


def _class_descriptions(value: object) -> Iterator[Mapping[Any, Any]]:
    """Yield all dicts with a class path inside a value."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            if "class_path" in item:
                yield item
            pending += item.values()
        elif isinstance(item, (list, tuple)):
            pending += item


def _without_downloads(description: Any) -> Any:
    """Return a description whose builder does not fetch a backbone's weights, which torchvision does by default."""
    class_path = description if isinstance(description, str) else str(description.get("class_path", ""))
    builder = _builder(class_path) if "." in class_path else None
    if builder is None or "weights_backbone" not in inspect.signature(builder).parameters:
        return description
    spec: dict[str, Any] = {"class_path": description} if isinstance(description, str) else dict(description)
    spec["init_args"] = {**(spec.get("init_args") or {}), "weights_backbone": None}
    return spec

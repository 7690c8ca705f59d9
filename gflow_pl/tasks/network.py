"""From what a user writes for a network to the network itself."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from gflow_pl.models import build

__all__ = ["HANDED_OVER", "build_network", "hyper_parameter"]

HANDED_OVER = "handed_over"
"""Key under which the hyper-parameters note that the network was a module, not a description of one."""


def hyper_parameter(network: str | dict[str, Any] | nn.Module) -> str | dict[str, Any]:
    """What the hyper-parameters store of `network`: a name, a class path with its arguments, or a note."""
    if isinstance(network, nn.Module):
        return {HANDED_OVER: f"{type(network).__module__}.{type(network).__qualname__}"}
    return network


def build_network(network: str | dict[str, Any] | nn.Module, num_classes: int) -> nn.Module:
    """The network that a name of ours, a class path with its arguments, or a module stands for.

    Args:
        network: A name ("resnet56"), ``{"class_path": "torchvision.models.resnet18", "init_args": {...}}``, or a module.
        num_classes: Classes; handed to the class as `num_classes` if it takes that and `init_args` has none.

    Raises:
        ValueError: The description names nothing that can be built.
    """
    if isinstance(network, nn.Module):
        return network
    if isinstance(network, str) and "." not in network:
        return build(network, num_classes)
    spec: dict[str, Any] = {"class_path": network} if isinstance(network, str) else dict(network)
    if HANDED_OVER in spec:
        raise ValueError(
            f"The network of this checkpoint was a {spec[HANDED_OVER]} handed over in Python, which a file cannot hold: "
            f"build it and pass it again, load_from_checkpoint(path, network=...)."
        )
    unknown = set(spec) - {"class_path", "init_args", "dict_kwargs"}
    if "class_path" not in spec or unknown:
        raise ValueError(
            "`network` must be a name, or a class_path with its init_args, got the keys "
            f"{sorted(map(str, spec))}; for example {{class_path: torchvision.models.resnet18, init_args: {{}}}}."
        )
    factory = _imported(str(spec["class_path"]))
    arguments = {**(spec.get("init_args") or {}), **(spec.get("dict_kwargs") or {})}
    return _called(factory, str(spec["class_path"]), arguments, num_classes)


def _imported(class_path: str) -> Any:
    module_name, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`network`: cannot import '{class_path}' ({error}); check the spelling and the installation."
        ) from None


def _called(factory: Any, class_path: str, arguments: dict[str, Any], num_classes: int) -> nn.Module:
    if not callable(factory):
        raise ValueError(f"`network`: {class_path} is no class or function that makes a network.")
    try:
        parameters = _parameters_of(factory)
        takes_classes = "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if takes_classes:
            given = arguments.setdefault("num_classes", num_classes)
            if given != num_classes:
                raise ValueError(
                    f"`network`: num_classes is {given} in init_args, but the data has {num_classes} classes."
                )
        network = factory(**arguments)
    except TypeError as error:
        raise ValueError(f"`network`: {class_path} does not take these arguments ({error}).") from None
    if not isinstance(network, nn.Module):
        raise ValueError(f"`network`: {class_path} makes a {type(network).__name__}, expected a torch.nn.Module.")
    return network


def _parameters_of(factory: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except ValueError:  # some builtin types have no signature
        return {}

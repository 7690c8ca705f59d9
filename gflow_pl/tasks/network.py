"""From what a user writes for a network to the network itself."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.models import build

__all__ = ["HANDED_OVER", "build_network", "check_classifies", "hyper_parameter"]

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


def check_classifies(network: nn.Module, num_classes: int, image_size: int) -> None:
    """Refuse a network that does not give one logit a class for images, before anything is trained.

    Args:
        network: The network, on the CPU; its flags, its buffers and torch's random numbers stay as they are.
        num_classes: Classes of the data.
        image_size: Side of the images in pixels.

    Raises:
        ValueError: It has no weights, does not run on such images, or gives something else.
    """
    name = type(network).__name__
    if next(network.parameters(), None) is None:
        raise ValueError(f"`network`: {name} has no weights to train.")
    try:
        with evaluation_mode(network), torch.random.fork_rng(devices=[]), torch.no_grad():
            logits = network(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:  # a foreign forward may raise anything on inputs that are not its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`network`: {name} does not run on images of 3x{image_size}x{image_size} ({reason})."
        ) from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, num_classes):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"`network`: {name} gives {found} for 2 images, expected logits (2, {num_classes}): the data has {num_classes} "
            "classes. Choose a network (or a file) that was made for them."
        )


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

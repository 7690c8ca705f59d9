"""Build a network from its description in the settings, and check that it classifies images."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gflow_pl.common.errors import SettingsError
from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.models import build

__all__ = ["build_network", "check_classifies", "network_hyperparameter"]

_MODULE_IN_PYTHON = "handed_over"
"""Key of the hyperparameters for a network that was passed as a module, which hyperparameters cannot describe."""


def network_hyperparameter(network: str | dict[str, Any] | nn.Module) -> str | dict[str, Any]:
    """Return the form of `network` that is stored in the hyperparameters.

    It is the description itself or, for a module, the name of its class under a key that `build_network` refuses.
    """
    if isinstance(network, nn.Module):
        return {_MODULE_IN_PYTHON: f"{type(network).__module__}.{type(network).__qualname__}"}
    return network


def build_network(network: str | dict[str, Any] | nn.Module, num_classes: int) -> nn.Module:
    """Build the network that a description refers to.

    Args:
        network: The name of a network of this package ("resnet56"), a class path ("torchvision.models.resnet18"), a
            class path with its arguments (``{"class_path": ..., "init_args": {...}}``; `dict_kwargs` holds arguments
            beyond the signature), or a module, which is returned.
        num_classes: Number of classes. It is passed to the class as `num_classes` if the class has such a parameter.

    Raises:
        SettingsError: The network cannot be built from the description.
    """
    # Modules, and names of networks of this package
    if isinstance(network, nn.Module):
        return network
    if isinstance(network, str) and "." not in network:
        return build(network, num_classes)

    # Class paths
    spec: dict[str, Any] = {"class_path": network} if isinstance(network, str) else dict(network)
    if _MODULE_IN_PYTHON in spec:
        raise SettingsError(
            f"The network of this checkpoint is a {spec[_MODULE_IN_PYTHON]} that was passed as a module, which a file "
            "cannot contain: build the module and pass it again, load_from_checkpoint(path, network=...)."
        )
    unknown = set(spec) - {"class_path", "init_args", "dict_kwargs"}
    if "class_path" not in spec or unknown:
        raise SettingsError(
            "`network` must be a name, or a class_path with its init_args, got the keys "
            f"{sorted(map(str, spec))}; for example {{class_path: torchvision.models.resnet18, init_args: {{}}}}."
        )
    factory = _import_factory(str(spec["class_path"]))
    arguments = {**(spec.get("init_args") or {}), **(spec.get("dict_kwargs") or {})}
    return _call_factory(factory, str(spec["class_path"]), arguments, num_classes)


def check_classifies(network: nn.Module, num_classes: int, image_size: int) -> None:
    """Check before training that a network has weights and returns one logit per class for images.

    The check is a forward pass, which does not change the network or the state of torch's random number generator.

    Args:
        network: The network, on the CPU.
        num_classes: Number of classes of the data.
        image_size: Height and width of the images in pixels.

    Raises:
        SettingsError: The network has no weights, fails for such images, or returns something else.
    """
    # Run the network on two images.
    name = type(network).__name__
    if next(network.parameters(), None) is None:
        raise SettingsError(f"`network`: {name} has no weights to train.")
    try:
        with evaluation_mode(network), torch.random.fork_rng(devices=[]), torch.no_grad():
            logits = network(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:  # a forward pass may raise anything for inputs that it does not expect
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingsError(
            f"`network`: {name} does not run on images of 3x{image_size}x{image_size} ({reason})."
        ) from error

    # Check the logits.
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, num_classes):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise SettingsError(
            f"`network`: {name} gives {found} for 2 images, expected logits (2, {num_classes}) because the data has "
            f"{num_classes} classes: choose a network or a file for {num_classes} classes."
        )


def _import_factory(class_path: str) -> object:
    """Import the class or function that builds a network."""
    module_name, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"`network`: cannot import '{class_path}' ({error}); check the spelling and the installation."
        ) from None


def _call_factory(factory: object, class_path: str, arguments: dict[str, Any], num_classes: int) -> nn.Module:
    """Build a network with a class or function, which receives `num_classes` if it accepts it."""
    if not callable(factory):
        raise SettingsError(f"`network`: {class_path} is not a class or function that returns a network.")
    try:
        parameters = _parameters_of(factory)
        takes_classes = "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if takes_classes:
            given = arguments.setdefault("num_classes", num_classes)
            if given != num_classes:
                raise SettingsError(
                    f"`network`: num_classes is {given} in init_args, but the data has {num_classes} classes."
                )
        network = factory(**arguments)
    except TypeError as error:
        raise SettingsError(f"`network`: {class_path} does not take these arguments ({error}).") from None
    if not isinstance(network, nn.Module):
        raise SettingsError(f"`network`: {class_path} returns a {type(network).__name__}, expected a torch.nn.Module.")
    return network


def _parameters_of(factory: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a class or function by name."""
    try:
        return inspect.signature(factory).parameters
    except ValueError:  # some builtin types have no signature
        return {}

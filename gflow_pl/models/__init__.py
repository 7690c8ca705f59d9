"""The networks of the paper for small images, as plain modules without anything specific to pruning.

Tensors have the names and the order of the published code, so that its weight files can be loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

from gflow_pl.common.errors import SettingsError
from gflow_pl.models.mobilenet import mobilenet_v1
from gflow_pl.models.published import is_published, strip_prefix
from gflow_pl.models.resnet import resnet18, resnet34, resnet56
from gflow_pl.models.vgg import vgg13

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "vgg13": vgg13,
    "mobilenet_v1": mobilenet_v1,
    "resnet56": resnet56,
    "resnet34": resnet34,
    "resnet18": resnet18,
}
"""Factory function of every network by name; called with the number of classes."""

__all__ = [
    "MODELS",
    "build",
    "check_image_size",
    "is_published",
    "mobilenet_v1",
    "resnet18",
    "resnet34",
    "resnet56",
    "strip_prefix",
    "vgg13",
]


def build(name: str, num_classes: int = 100) -> nn.Module:
    """Return a newly initialized network by name.

    Args:
        name: A key of `MODELS`.
        num_classes: Number of classes, at least 1.

    Raises:
        SettingsError: The name is unknown, or `num_classes` is too small.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(str(name), MODELS, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise SettingsError(f"Unknown network '{name}'. Known: {', '.join(sorted(MODELS))}.{hint}")
    if num_classes < 1:
        raise SettingsError(f"Network '{name}': `num_classes` must be at least 1, got {num_classes}.")
    return MODELS[name](num_classes)


def check_image_size(model: nn.Module, image_size: int | tuple[int, int]) -> None:
    """Raise if images are too small for a network, so that a command can stop before training starts.

    Args:
        model: A network. Its attribute ``min_image_size`` is the smallest side in pixels; without it, any size is
            accepted.
        image_size: Side of the images in pixels, or (height, width).

    Raises:
        SettingsError: A side is smaller than the network accepts.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    least = getattr(model, "min_image_size", 1)
    if min(height, width) < least:
        raise SettingsError(
            f"Images of {height}x{width} pixels are too small for {type(model).__name__}, which needs at least "
            f"{least}x{least}: set `image_size` to {least} or more."
        )

"""The networks of the paper for small images: plain modules that know nothing of pruning.

Tensor names and their order are those of the published code, so that its weight files fit.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

from gflow_pl.models.mobilenet import mobilenet_v1
from gflow_pl.models.published import is_published, published_shapes, read_checkpoint, read_published, strip_prefix
from gflow_pl.models.resnet import resnet18, resnet34, resnet56
from gflow_pl.models.vgg import vgg13

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "vgg13": vgg13,
    "mobilenet_v1": mobilenet_v1,
    "resnet56": resnet56,
    "resnet34": resnet34,
    "resnet18": resnet18,
}

__all__ = [
    "MODELS",
    "build",
    "check_image_size",
    "is_published",
    "mobilenet_v1",
    "published_shapes",
    "read_checkpoint",
    "read_published",
    "resnet18",
    "resnet34",
    "resnet56",
    "strip_prefix",
    "vgg13",
]


def build(name: str, num_classes: int = 100) -> nn.Module:
    """A freshly initialised network by its name.

    Args:
        name: One of `MODELS`.
        num_classes: Width of the output, at least 1.

    Raises:
        ValueError: The name is not known, or there are no classes.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(str(name), MODELS, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"Unknown network '{name}'. Known: {', '.join(sorted(MODELS))}.{hint}")
    if num_classes < 1:
        raise ValueError(f"Network '{name}': `num_classes` must be at least 1, got {num_classes}.")
    return MODELS[name](num_classes)


def check_image_size(model: nn.Module, image_size: int | tuple[int, int]) -> None:
    """Refuse images that are too small for a network before anything is trained.

    Args:
        model: A network; one that declares no ``min_image_size`` (the least side in pixels) takes any size.
        image_size: Side of the images in pixels, or (height, width).

    Raises:
        ValueError: A side is smaller than the network can take.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    least = getattr(model, "min_image_size", 1)
    if min(height, width) < least:
        raise ValueError(
            f"Images of {height}x{width} pixels are too small for {type(model).__name__}, which needs at least "
            f"{least}x{least}: set `image_size` to {least} or more."
        )

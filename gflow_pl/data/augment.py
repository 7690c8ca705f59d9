"""Augmentation and normalization: from uint8 images to the input of a network.

All operations work on batches, on the device of the images. Random numbers are drawn on the CPU, so that they do not
depend on the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

__all__ = ["LabelledImages", "ToInputs", "normalize", "random_crop", "random_flip"]

LabelledImages = tuple[Tensor, Tensor]
"""Images and their labels, either of one image or of a batch."""

_MEAN = 0.5
_STD = 0.5


def normalize(images: Tensor) -> Tensor:
    """Convert images to floats and normalize them with mean 0.5 and std 0.5: 0 becomes -1, and 255 becomes 1.

    Args:
        images: (batch, channels, height, width), uint8.

    Returns:
        (batch, channels, height, width), float32, in [-1, 1].
    """
    return images.float().div_(255).sub_(_MEAN).div_(_STD)


def random_crop(images: Tensor, padding: int, generator: torch.Generator | None = None) -> Tensor:
    """Shift every image by a random number of pixels in -padding..padding in both directions, filling with black.

    Args:
        images: (batch, channels, height, width), uint8.
        padding: Largest shift in pixels.
        generator: A CPU generator; None uses the global one of torch.
    """
    batch, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, batch), generator=generator).to(images.device)
    padded = F.pad(images, (padding,) * 4)
    # A view of all shifted images: (batch, channels, 2 * padding + 1, 2 * padding + 1, height, width).
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(batch, device=images.device), :, top, left]


def random_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Flip every image horizontally with probability 0.5.

    Args:
        images: (batch, channels, height, width).
        generator: A CPU generator; None uses the global one of torch.
    """
    flipped = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


class ToInputs:
    """Collate function that returns a batch of inputs for a network, augmented or not.

    Each batch draws one seed for its augmentation from torch's global generator, so a run with a restored random state
    continues with the same batches. In a worker process of a loader, this is the generator of the worker: the batches
    depend on the number of workers.

    Args:
        augment: Whether images are randomly shifted by up to 4 pixels and flipped.
        rank: Rank of the process. All ranks have the same seed; adding the rank makes their augmentation independent.
    """

    padding = 4

    def __init__(self, *, augment: bool = False, rank: int = 0) -> None:
        self.augment = augment
        self.rank = rank

    def __call__(self, batch: LabelledImages | list[LabelledImages]) -> LabelledImages:
        """Return normalized images (batch, channels, height, width) and labels (batch,).

        Args:
            batch: A pair of uint8 images (batch, channels, height, width) and labels (batch,), or a list of pairs of
                one image and one label.
        """
        images, labels = default_collate(batch) if isinstance(batch, list) else batch
        if self.augment:
            seed = int(torch.randint(2**62, ()))
            generator = torch.Generator().manual_seed(seed + self.rank)
            images = random_flip(random_crop(images, self.padding, generator), generator)
        return normalize(images), labels

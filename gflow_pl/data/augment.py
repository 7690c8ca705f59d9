"""From uint8 images to what a network sees: the one place of augmentation and normalisation.

Everything is a batched operation on whatever device the images are on. The random numbers are drawn on the CPU, so that
they are the same there and elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

__all__ = ["ToInputs", "normalize", "random_crop", "random_flip"]

MEAN = 0.5
STD = 0.5


def normalize(images: Tensor) -> Tensor:
    """Float images of mean 0.5, std 0.5: 0 becomes -1 and 255 becomes 1.

    Args:
        images: (batch, channels, height, width), uint8.
    """
    return images.float().div_(255).sub_(MEAN).div_(STD)


def random_crop(images: Tensor, padding: int, generator: torch.Generator | None = None) -> Tensor:
    """Every image shifted by -padding..padding pixels in both directions; black moves in.

    Args:
        images: (batch, channels, height, width), uint8.
        padding: Pixels.
        generator: A generator of the CPU; None draws from torch's global one.
    """
    batch, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, batch), generator=generator).to(images.device)
    padded = F.pad(images, (padding,) * 4)
    # A view of all windows: (batch, channels, 2 * padding + 1, 2 * padding + 1, height, width).
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(batch, device=images.device), :, top, left]


def random_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Every image mirrored left to right with probability one half.

    Args:
        images: (batch, channels, height, width).
        generator: A generator of the CPU; None draws from torch's global one.
    """
    flipped = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


class ToInputs:
    """Collates images and labels into a batch for a network, augmented or plain.

    Augmentation starts from one draw of torch's global generator for each batch, so that a run whose random state is
    restored goes on with the same batches. In loader workers that is the worker's own generator: their number is part
    of the seed.

    Args:
        augment: Shift by up to 4 pixels and mirror, at random; False gives the images as they are.
        rank: Rank of the process. All ranks share one seed; this makes their images shift independently.
    """

    padding = 4

    def __init__(self, *, augment: bool = False, rank: int = 0) -> None:
        self.augment = augment
        self.rank = rank

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Float images (batch, channels, height, width) and labels (batch,).

        Args:
            batch: A pair (uint8 images, labels), or a list of such pairs for single images.
        """
        images, labels = default_collate(batch) if isinstance(batch, list) else batch
        if self.augment:
            seed = int(torch.randint(2**62, ()))
            generator = torch.Generator().manual_seed(seed + self.rank)
            images = random_flip(random_crop(images, self.padding, generator), generator)
        return normalize(images), labels

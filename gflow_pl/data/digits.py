"""The handwritten digits that come with scikit-learn: real images that need no download."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from gflow_pl.data.data_module import ImageDataModule
from gflow_pl.data.image_sets import ImagesInMemory

__all__ = ["Digits"]

_EVERY = 5
"""Of each digit, every fifth image is a test image."""


class Digits(ImageDataModule):
    """scikit-learn's 1,797 handwritten digits, enlarged from 8x8 to 3x32x32; a fixed fifth of each is for testing.

    Nothing is augmented: a mirrored digit is no digit.
    """

    augments = False

    def __init__(
        self,
        *,
        batch_size: int = 128,
        val_fraction: float = 0.0,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            batch_size: Images in a batch of each process.
            val_fraction: Share of the training images held out for validation, in [0, 1). With 0, as published, the
                validation images are the test images: the best epoch is then chosen on test data.
            num_workers: Worker processes of a loader; null chooses 0, since the images are in memory.
            seed: Draws the images that are held out; shuffling follows the run's own seed.
        """
        super().__init__(
            num_classes=10,
            image_size=32,
            batch_size=batch_size,
            val_fraction=val_fraction,
            num_workers=num_workers,
            seed=seed,
        )

    def load(self, part: Literal["train", "test"]) -> ImagesInMemory:
        """All training (1,442) or all test (355) images."""
        from sklearn.datasets import load_digits  # a slow import that only this data needs

        digits = load_digits()
        labels = torch.from_numpy(digits.target).long()
        # The digits come in runs of 0..9: a stride over all of them would pick some digits more often.
        number = torch.stack([(labels == digit).cumsum(0) - 1 for digit in range(10)])[
            labels, torch.arange(len(labels))
        ]
        chosen = (number % _EVERY == _EVERY - 1) == (part == "test")
        grey = torch.from_numpy(digits.images)[chosen, None] * (255 / 16)
        large = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
        return ImagesInMemory(large.expand(-1, 3, -1, -1).contiguous(), labels[chosen])

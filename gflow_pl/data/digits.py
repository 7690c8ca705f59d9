"""The handwritten digits of scikit-learn: real images that need no download."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gflow_pl.data.data_module import ImageDataModule, Source
from gflow_pl.data.image_sets import ImagesInMemory

__all__ = ["Digits"]

_TEST_EVERY = 5
"""Every fifth image of each digit is a test image."""


class Digits(ImageDataModule):
    """The 1,797 handwritten digits of scikit-learn, enlarged from 8x8 to 3x32x32.

    A fixed fifth of each digit is for testing.

    Images are not augmented, because a flipped digit is not a digit.
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
        """Set the options. Images are loaded later.

        Args:
            batch_size: Number of images in a batch, for each process.
            val_fraction: Share of the training images held out for validation, in [0, 1). With 0, as published, the
                validation images are the test images: the best epoch is then chosen on test data.
            num_workers: Worker processes of a loader; null means 0, because the images are in memory.
            seed: Seed for the choice of the images held out. Shuffling uses the seed of the run.
        """
        super().__init__(
            num_classes=10,
            image_size=32,
            batch_size=batch_size,
            val_fraction=val_fraction,
            num_workers=num_workers,
            seed=seed,
        )

    def load(self, source: Source) -> ImagesInMemory:
        """Return all training (1,442) or all test (355) images."""
        from sklearn.datasets import load_digits  # imported here because it is slow and only needed for this data

        digits = load_digits()
        labels = torch.from_numpy(digits.target).long()
        # Count each digit separately: the images come in runs of 0..9, so every fifth of all would favour some digits.
        number = torch.stack([(labels == digit).cumsum(0) - 1 for digit in range(10)])[
            labels, torch.arange(len(labels))
        ]
        chosen = (number % _TEST_EVERY == _TEST_EVERY - 1) == (source == "test")
        grey = torch.from_numpy(digits.images)[chosen, None] * (255 / 16)
        large = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
        return ImagesInMemory(large.expand(-1, 3, -1, -1).contiguous(), labels[chosen])

"""Sets of labelled images, in memory or in files, that are read in batches of uint8 images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from gflow_pl.common.errors import SettingsError
from gflow_pl.data.augment import LabelledImages

__all__ = ["ImageFiles", "ImageSet", "ImagesInMemory"]


class ImageSet(Dataset[LabelledImages]):
    """Base class for sets of images (3, height, width) uint8 with int64 labels.

    Args:
        labels: (images,) int64.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> LabelledImages:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> LabelledImages:
        """Return images (batch, 3, height, width) and labels (batch,).

        A `DataLoader` calls this instead of `__getitem__`.
        """
        raise NotImplementedError

    def subset(self, indices: Tensor) -> ImageSet:
        """Return the images at some positions, in that order.

        Args:
            indices: (images,) int64.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the name of an image in a list of predictions: its position."""
        return str(index)


class ImagesInMemory(ImageSet):
    """Images in memory, as one tensor.

    Args:
        images: (images, 3, height, width) uint8.
        labels: (images,) int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(labels)
        self.images = images

    def __getitems__(self, indices: Sequence[int]) -> LabelledImages:
        """Return images (batch, 3, height, width) and labels (batch,)."""
        positions = torch.as_tensor(indices)
        return self.images[positions], self.labels[positions]

    def subset(self, indices: Tensor) -> ImagesInMemory:
        """Return the images at some positions, in that order.

        Args:
            indices: (images,) int64.
        """
        return ImagesInMemory(self.images[indices], self.labels[indices])


class ImageFiles(ImageSet):
    """Images in files, which are read for each batch and returned as squares of one size.

    An image of another size is resized (bilinear) so that its shorter side fits, and cropped to its centre.

    Args:
        root: Folder that the paths are relative to.
        paths: Paths of the files.
        labels: (images,) int64.
        image_size: Side of the squares in pixels.
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: Tensor, image_size: int) -> None:
        super().__init__(labels)
        self.root = root
        self.paths = list(paths)
        self.image_size = image_size

    def _read(self, index: int) -> Tensor:
        """Return an image (3, image_size, image_size) uint8; raise if its file cannot be read."""
        path = self.root / self.paths[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (
            OSError,
            SyntaxError,
            ValueError,
        ) as error:  # Pillow raises these for damaged files and files that are no images
            raise SettingsError(
                f"Image '{path}' could not be read: replace it or take it out of its folder."
            ) from error
        size = (self.image_size, self.image_size)
        if image.size != size:
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def __getitems__(self, indices: Sequence[int]) -> LabelledImages:
        """Return images (batch, 3, image_size, image_size) and labels (batch,)."""
        return torch.stack([self._read(int(i)) for i in indices]), self.labels[torch.as_tensor(indices)]

    def subset(self, indices: Tensor) -> ImageFiles:
        """Return the images at some positions, in that order.

        Args:
            indices: (images,) int64.
        """
        paths = [self.paths[i] for i in indices.tolist()]
        return ImageFiles(self.root, paths, self.labels[indices], self.image_size)

    def name(self, index: int) -> str:
        """Return the name of an image in a list of predictions: its path relative to the root."""
        return self.paths[index]

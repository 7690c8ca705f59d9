"""Sets of labelled images, in memory or in files; both hand out whole batches of uint8 images at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["ImageFiles", "ImageSet", "ImagesInMemory"]


class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Images as uint8 tensors (3, height, width) with int64 labels.

    Args:
        labels: (images,) int64.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch, (batch, 3, height, width) and (batch,); PyTorch's loaders call this instead of item by item."""
        raise NotImplementedError

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at some positions, in that order."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What an image is called in a list of predictions: its position."""
        return str(index)


class ImagesInMemory(ImageSet):
    """Images that are all held as one tensor.

    Args:
        images: (images, 3, height, width) uint8.
        labels: (images,) int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(labels)
        self.images = images

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch, (batch, 3, height, width) and (batch,)."""
        positions = torch.as_tensor(indices)
        return self.images[positions], self.labels[positions]

    def subset(self, indices: Tensor) -> ImagesInMemory:
        """The images at some positions, in that order."""
        return ImagesInMemory(self.images[indices], self.labels[indices])


class ImageFiles(ImageSet):
    """Images that are read from their files when they are asked for, as squares of one size.

    An image of another size is scaled (bilinear) until its shorter side fits, and cut to its centre; one of the right
    size is taken as it is.

    Args:
        root: Folder that the paths start from.
        paths: Of the files, relative to `root`.
        labels: (images,) int64.
        image_size: Side in pixels.
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: Tensor, image_size: int) -> None:
        super().__init__(labels)
        self.root = root
        self.paths = list(paths)
        self.image_size = image_size

    def _read(self, index: int) -> Tensor:
        path = self.root / self.paths[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for files that are damaged or no images
            raise ValueError(f"Image '{path}' could not be read: replace it or take it out of its folder.") from error
        size = (self.image_size, self.image_size)
        if image.size != size:
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch, (batch, 3, image_size, image_size) and (batch,)."""
        return torch.stack([self._read(int(i)) for i in indices]), self.labels[torch.as_tensor(indices)]

    def subset(self, indices: Tensor) -> ImageFiles:
        """The images at some positions, in that order."""
        paths = [self.paths[i] for i in indices.tolist()]
        return ImageFiles(self.root, paths, self.labels[indices], self.image_size)

    def name(self, index: int) -> str:
        """What an image is called in a list of predictions: its path from the root."""
        return self.paths[index]

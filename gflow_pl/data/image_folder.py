"""Any image classification data: a folder with ``train/`` and ``test/``, and in each one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torchvision import datasets

from gflow_pl.data.data_module import ImageDataModule
from gflow_pl.data.image_sets import ImageFiles

__all__ = ["ImageFolder"]


class ImageFolder(ImageDataModule):
    """Images of any size and format in ``root/train/<class>/`` and ``root/test/<class>/``; the classes are counted.

    Training images are shifted by up to 4 pixels and mirrored at random.
    """

    in_memory = False

    def __init__(
        self,
        root: str,
        *,
        image_size: int = 32,
        batch_size: int = 128,
        val_fraction: float = 0.0,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        """Count the classes; the images are read later.

        Args:
            root: Folder with ``train/`` and ``test/``.
            image_size: Side of the images in pixels; others are scaled and cut to their centre.
            batch_size: Images in a batch of each process.
            val_fraction: Share of the training images held out for validation, in [0, 1). With 0, as published, the
                validation images are the test images: the best epoch is then chosen on test data.
            num_workers: Worker processes of a loader; null chooses one a CPU, at most 4. With workers, their number is
                part of the augmentation's seed.
            seed: Draws the images that are held out; shuffling and augmentation follow the run's own seed.

        Raises:
            ValueError: `root`, ``train/`` or ``test/`` is missing, has no classes, or the two have other classes.
        """
        if image_size < 1:
            raise ValueError(f"`image_size` must be at least 1 pixel, got {image_size}.")
        self.root = str(root)
        classes = self._classes("train")
        self._check_same_classes(classes, self._classes("test"))
        super().__init__(
            num_classes=len(classes),
            image_size=image_size,
            class_names=classes,
            batch_size=batch_size,
            val_fraction=val_fraction,
            num_workers=num_workers,
            seed=seed,
        )

    def load(self, part: Literal["train", "test"]) -> ImageFiles:
        """All training or all test images, class by class, in the order of their names.

        Raises:
            ValueError: A class has no images.
        """
        root = Path(self.root)
        try:
            samples = datasets.ImageFolder(str(root / part)).samples
        except FileNotFoundError as error:  # torchvision's word for classes without images; it names them
            raise ValueError(f"ImageFolder: a class in '{root / part}' has no images: {error}") from error
        paths = [Path(path).relative_to(root).as_posix() for path, _ in samples]
        return ImageFiles(root, paths, torch.tensor([label for _, label in samples]), self.image_size)

    def _classes(self, part: str) -> list[str]:
        folder = Path(self.root) / part
        want = "expected train/ and test/ with one folder of images for each class"
        if not Path(self.root).is_dir():
            raise ValueError(f"ImageFolder: there is no folder '{self.root}': {want}. Set --data.root to it.")
        if not folder.is_dir():
            raise ValueError(f"ImageFolder: '{self.root}' has no {part}/: {want}.")
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if not classes:
            raise ValueError(f"ImageFolder: '{folder}' has no class folders: {want}.")
        return classes

    def _check_same_classes(self, train: list[str], test: list[str]) -> None:
        for here, there, lacking in (
            ("train", "test", set(train) - set(test)),
            ("test", "train", set(test) - set(train)),
        ):
            if lacking:
                names = ", ".join(f"'{name}'" for name in sorted(lacking)[:3])
                raise ValueError(
                    f"ImageFolder: {len(lacking)} of the classes in '{self.root}/{here}' have no folder in {there}/ "
                    f"({names}): both need the same class folders."
                )

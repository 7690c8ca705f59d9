"""Images in folders: ``train/`` and ``test/``, each with one folder for each class."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision import datasets

from gflow_pl.common.errors import SettingsError
from gflow_pl.data.data_module import ImageDataModule, Source
from gflow_pl.data.image_sets import ImageFiles

__all__ = ["ImageFolder"]


class ImageFolder(ImageDataModule):
    """Images of any size and format in ``root/train/<class>/`` and ``root/test/<class>/``.

    Training images are randomly shifted by up to 4 pixels and flipped horizontally.
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
        """Set the options and list the classes. Images are read later.

        Args:
            root: Folder with ``train/`` and ``test/``.
            image_size: Side of the images in pixels. Images of another size are resized and cropped to their centre.
            batch_size: Number of images in a batch, for each process.
            val_fraction: Share of the training images held out for validation, in [0, 1). With 0, as published, the
                validation images are the test images: the best epoch is then chosen on test data.
            num_workers: Worker processes of a loader; null means one for each CPU, at most 4. The augmentation depends
                on their number.
            seed: Seed for the choice of the images held out. Shuffling and augmentation use the seed of the run.

        Raises:
            SettingsError: `root`, ``train/`` or ``test/`` is missing or has no classes, or the classes of the two
                differ.
        """
        if image_size < 1:
            raise SettingsError(f"`image_size` must be at least 1 pixel, got {image_size}.")
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

    def load(self, source: Source) -> ImageFiles:
        """Return all training or all test images, class by class, in the order of their names.

        Raises:
            SettingsError: A class has no images.
        """
        root = Path(self.root)
        try:
            samples = datasets.ImageFolder(str(root / source)).samples
        except FileNotFoundError as error:  # a class without images; the message of torchvision names it
            raise SettingsError(f"ImageFolder: a class in '{root / source}' has no images: {error}") from error
        paths = [Path(path).relative_to(root).as_posix() for path, _ in samples]
        return ImageFiles(root, paths, torch.tensor([label for _, label in samples]), self.image_size)

    def _classes(self, part: str) -> list[str]:
        """Return the sorted names of the class folders in a part; raise if there are none."""
        folder = Path(self.root) / part
        expected = "expected train/ and test/ with one folder of images for each class"
        if not Path(self.root).is_dir():
            raise SettingsError(f"ImageFolder: there is no folder '{self.root}': {expected}. Set --data.root to it.")
        if not folder.is_dir():
            raise SettingsError(f"ImageFolder: '{self.root}' has no {part}/: {expected}.")
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if not classes:
            raise SettingsError(f"ImageFolder: '{folder}' has no class folders: {expected}.")
        return classes

    def _check_same_classes(self, train: list[str], test: list[str]) -> None:
        """Raise if a class of the training images is missing in the test images, or the other way round."""
        for here, there, missing in (
            ("train", "test", set(train) - set(test)),
            ("test", "train", set(test) - set(train)),
        ):
            if missing:
                names = ", ".join(f"'{name}'" for name in sorted(missing)[:3])
                raise SettingsError(
                    f"ImageFolder: {len(missing)} of the classes in '{self.root}/{here}' have no folder in {there}/ "
                    f"({names}): both need the same class folders."
                )

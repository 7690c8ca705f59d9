"""CIFAR-10 and CIFAR-100, in the files that torchvision reads and downloads."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision import datasets

from gflow_pl.common.errors import SettingsError
from gflow_pl.data.data_module import ImageDataModule, Source
from gflow_pl.data.image_sets import ImagesInMemory

__all__ = ["CIFAR10", "CIFAR100"]


class _CIFAR(ImageDataModule):
    """Base class of the two CIFAR data modules: 50,000 training and 10,000 test images of 32x32 pixels.

    Attributes:
        dataset: Data set class of torchvision.
        num_labels: Number of classes.
    """

    dataset: type[datasets.CIFAR10]
    num_labels: int

    def __init__(
        self,
        root: str = "data",
        *,
        download: bool = False,
        batch_size: int = 128,
        val_fraction: float = 0.0,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        """Set the folder and the options. Images are loaded later.

        Args:
            root: Folder of the unpacked archive.
            download: Download and unpack the archive if it is missing.
            batch_size: Number of images in a batch, for each process.
            val_fraction: Share of the training images held out for validation, in [0, 1). With 0, as published, the
                validation images are the test images: the best epoch is then chosen on test data.
            num_workers: Worker processes of a loader; null means 0, because the images are in memory.
            seed: Seed for the choice of the images held out. Shuffling and augmentation use the seed of the run.
        """
        super().__init__(
            num_classes=self.num_labels,
            image_size=32,
            batch_size=batch_size,
            val_fraction=val_fraction,
            num_workers=num_workers,
            seed=seed,
        )
        self.root = str(root)
        self.download = download

    def check_data(self) -> None:
        """Raise if the files are missing and may not be downloaded.

        Raises:
            SettingsError: Files are missing and `download` is false.
        """
        files = [name for name, _ in (*self.dataset.train_list, *self.dataset.test_list)]
        folder = Path(self.root) / self.dataset.base_folder
        if not self.download and not all((folder / name).is_file() for name in files):
            raise SettingsError(self._missing_data_message("is not"))

    def prepare_data(self) -> None:
        """Download the archive if it is missing and `download` is true.

        Lightning calls this in one process on each machine.
        """
        self.check_data()
        if self.download:
            try:
                self.dataset(self.root, train=False, download=True)
            except (OSError, RuntimeError) as error:  # no connection, no space left, or a wrong checksum
                raise SettingsError(
                    self._missing_data_message(f"could not be downloaded ({error}) and is not")
                ) from error

    def load(self, source: Source) -> ImagesInMemory:
        """Return all training or all test images, in the order of the files.

        Raises:
            SettingsError: Files are missing or damaged.
        """
        self.check_data()
        try:
            data = self.dataset(self.root, train=source == "train")
        except RuntimeError as error:  # torchvision raises it for a wrong checksum
            raise SettingsError(self._missing_data_message("is damaged or incomplete")) from error
        self.class_names = list(data.classes)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return ImagesInMemory(images, torch.tensor(data.targets))

    def _missing_data_message(self, state: str) -> str:
        """Return the message that the data is missing or damaged, with ways to get it.

        Args:
            state: The words between "the data" and "in FOLDER", such as "is not".
        """
        folder = Path(self.root) / self.dataset.base_folder
        return (
            f"{type(self).__name__}: the data {state} in '{folder}'. Set --data.download=true to download it, or "
            f"unpack {self.dataset.filename} in '{self.root}', or set --data.root to the folder that contains "
            f"{self.dataset.base_folder}/."
        )


class CIFAR10(_CIFAR):
    """CIFAR-10: 10 classes, 50,000 training and 10,000 test images of 32x32 pixels.

    Training images are randomly shifted by up to 4 pixels and flipped horizontally.
    """

    dataset = datasets.CIFAR10
    num_labels = 10


class CIFAR100(_CIFAR):
    """CIFAR-100: 100 classes, 50,000 training and 10,000 test images of 32x32 pixels.

    Training images are randomly shifted by up to 4 pixels and flipped horizontally.
    """

    dataset = datasets.CIFAR100
    num_labels = 100

"""CIFAR-10 and CIFAR-100, from torchvision's own files and by its own download."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torchvision import datasets

from gflow_pl.data.data_module import ImageDataModule
from gflow_pl.data.image_sets import ImagesInMemory

__all__ = ["CIFAR10", "CIFAR100"]


class _CIFAR(ImageDataModule):
    """50,000 training and 10,000 test images of 32x32 pixels; see the two classes below."""

    source: type[datasets.CIFAR10]
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
        """Take note of where the images are; they are loaded later.

        Args:
            root: Folder that holds, or is to hold, the unpacked archive.
            download: Fetch the archive if it is not there; one process a machine does so.
            batch_size: Images in a batch of each process.
            val_fraction: Share of the training images held out for validation, in [0, 1). With 0, as published, the
                validation images are the test images: the best epoch is then chosen on test data.
            num_workers: Worker processes of a loader; null chooses 0, since the images are in memory.
            seed: Draws the images that are held out; shuffling and augmentation follow the run's own seed.
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
        """Look whether the files are there, or may be fetched.

        Raises:
            ValueError: They are not there and `download` is off.
        """
        files = [name for name, _ in (*self.source.train_list, *self.source.test_list)]
        folder = Path(self.root) / self.source.base_folder
        if not self.download and not all((folder / name).is_file() for name in files):
            raise ValueError(self._how_to_get_it("is not"))

    def prepare_data(self) -> None:
        """Fetch the archive if that is allowed and needed; Lightning calls this in one process a machine."""
        self.check_data()
        if self.download:
            try:
                self.source(self.root, train=False, download=True)
            except (OSError, RuntimeError) as error:  # no connection, no space, or a checksum that does not hold
                raise ValueError(self._how_to_get_it(f"could not be fetched ({error}) and is not")) from error

    def load(self, part: Literal["train", "test"]) -> ImagesInMemory:
        """All training or all test images, in the order of the files.

        Raises:
            ValueError: The files are not there or damaged.
        """
        self.check_data()
        try:
            data = self.source(self.root, train=part == "train")
        except RuntimeError as error:  # torchvision's word for a checksum that does not hold
            raise ValueError(self._how_to_get_it("is damaged or not whole")) from error
        self.class_names = list(data.classes)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return ImagesInMemory(images, torch.tensor(data.targets))

    def _how_to_get_it(self, state: str) -> str:
        folder = Path(self.root) / self.source.base_folder
        return (
            f"{type(self).__name__}: the data {state} in '{folder}'. Set --data.download=true to fetch it, or unpack "
            f"{self.source.filename} in '{self.root}', or set --data.root to the folder that holds "
            f"{self.source.base_folder}/."
        )


class CIFAR10(_CIFAR):
    """CIFAR-10: 10 classes, 50,000 training and 10,000 test images of 32x32 pixels.

    Training images are shifted by up to 4 pixels and mirrored at random.
    """

    source = datasets.CIFAR10
    num_labels = 10


class CIFAR100(_CIFAR):
    """CIFAR-100: 100 classes, 50,000 training and 10,000 test images of 32x32 pixels.

    Training images are shifted by up to 4 pixels and mirrored at random.
    """

    source = datasets.CIFAR100
    num_labels = 100

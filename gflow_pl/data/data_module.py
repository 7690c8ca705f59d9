"""Base class of the data modules: splitting into training, validation and test images, and loaders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch.utils.data import DataLoader

from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import pl
from gflow_pl.data.augment import LabelledImages, ToInputs
from gflow_pl.data.image_sets import ImageSet
from gflow_pl.data.unrepeated_sampler import UnrepeatedSampler, even_batch_size

__all__ = ["ImageDataModule", "Source"]

Source = Literal["train", "test"]
"""A set of images as it is stored."""

Part = Literal["train", "val", "test"]
"""A set of images after the split into training and validation images."""


class ImageDataModule(pl.LightningDataModule):
    """Base class for data modules with square colour images in a training and a test set. Subclasses define `load`.

    Batches are float images (batch, 3, image_size, image_size), normalized with mean 0.5 and std 0.5, and int64 labels
    (batch,). Training batches are shuffled and augmented with torch's global random generator (``seed_everything``). No
    loader keeps random state between epochs, so a run can be resumed at any epoch.

    Attributes:
        num_classes: Number of classes.
        image_size: Side of the images in pixels.
        class_names: Names of the classes, in the order of their labels.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels.
        class_names: Names of the classes; by default their numbers.
        batch_size: Number of images in a batch, for each process.
        val_fraction: Share of the training images held out for validation, in [0, 1). With 0, the validation images are
            the test images.
        num_workers: Worker processes of a loader. None means 0 for images in memory, else one for each CPU, at most 4.
        seed: Seed for the choice of the images held out.

    Raises:
        SettingsError: A setting is out of its range.
    """

    augments = True
    """Whether training images are augmented."""
    in_memory = True
    """Whether the images are in memory. Loading is then faster without worker processes."""

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int,
        class_names: Sequence[str] = (),
        batch_size: int,
        val_fraction: float,
        num_workers: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise SettingsError(f"`batch_size` must be at least 1, got {batch_size}.")
        if not 0 <= val_fraction < 1:
            raise SettingsError(
                f"`val_fraction` must be in [0, 1), got {val_fraction}. It is a fraction: for 10 % write 0.1."
            )
        if num_workers is not None and num_workers < 0:
            raise SettingsError(f"`num_workers` must be at least 0, or null for a default, got {num_workers}.")
        self.num_classes = num_classes
        self.image_size = image_size
        self.class_names = list(class_names) or [str(label) for label in range(num_classes)]
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.num_workers = self._default_num_workers() if num_workers is None else num_workers
        self.seed = seed
        self._parts: dict[Part, ImageSet] = {}

    def load(self, source: Source) -> ImageSet:
        """Return all training or all test images.

        Raises:
            SettingsError: The images are missing. The message must say how to get them.
        """
        raise NotImplementedError

    def check_data(self) -> None:
        """Raise if the data is missing, before a command starts any work. The default does nothing.

        Raises:
            SettingsError: The data is missing. The message must say how to get it.
        """

    def setup(self, stage: str | None = None) -> None:
        """Load the images and split them. Later calls do nothing."""
        if self._parts:
            return
        train, test = self.load("train"), self.load("test")
        val = test
        if self.val_fraction > 0:
            num_held_out = round(self.val_fraction * len(train))
            if not 0 < num_held_out < len(train):
                raise SettingsError(
                    f"`val_fraction` {self.val_fraction} holds out {num_held_out} of {len(train)} training images: "
                    f"at least one must be held out, and at least one must be left."
                )
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
            held_out, remaining = order[:num_held_out].sort().values, order[num_held_out:].sort().values
            train, val = train.subset(remaining), train.subset(held_out)
        self._parts = {"train": train, "val": val, "test": test}

    def train_dataloader(self) -> DataLoader[LabelledImages]:
        """Return a loader of shuffled and augmented training batches."""
        return self._loader("train", training=True)

    def plain_train_dataloader(self) -> DataLoader[LabelledImages]:
        """Return a loader of the training images in order and without augmentation."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[LabelledImages]:
        """Return a loader of the images held out, or of the test images with ``val_fraction=0``."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[LabelledImages]:
        """Return a loader of the test images."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[LabelledImages]:
        """Return a loader of the test images; `predict_names` has the name of each row."""
        return self._loader("test")

    def predict_names(self) -> list[str]:
        """Return the names of the images of `predict_dataloader`, in order: paths below the root, or positions."""
        images = self._part("test")
        return [images.name(index) for index in range(len(images))]

    def _part(self, part: Part) -> ImageSet:
        """Return the images of a part, and load them if no Trainer has called `setup`."""
        self.setup()
        return self._parts[part]

    def _loader(self, part: Part, *, training: bool = False) -> DataLoader[LabelledImages]:
        """Return a loader of one part.

        Args:
            part: The part.
            training: Whether batches are shuffled and augmented.
        """
        rank, num_ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        images, batch_size, sampler = self._part(part), self.batch_size, None
        # Without shuffling, every rank evaluates its share of the images, none of them twice.
        if num_ranks > 1 and not training and even_batch_size(batch_size, len(images), num_ranks):
            batch_size, sampler = (
                even_batch_size(batch_size, len(images), num_ranks),
                UnrepeatedSampler(images, num_ranks, rank),
            )
        return DataLoader(
            images,
            batch_size=batch_size,
            shuffle=training,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=ToInputs(augment=training and self.augments, rank=rank),
            pin_memory=torch.cuda.is_available(),
            # Persistent workers would keep random state between epochs that no checkpoint contains.
            persistent_workers=False,
        )

    def _default_num_workers(self) -> int:
        """Return 0 for images in memory, else the number of CPUs, at most 4."""
        if self.in_memory:
            return 0
        # CPUs that this process may use, which are fewer than those of the machine in containers and batch systems.
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return min(4, cpus or 1)

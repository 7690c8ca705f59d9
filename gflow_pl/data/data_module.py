"""What all data modules share: the split, the loaders, and where batches come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from gflow_pl.data.augment import ToInputs
from gflow_pl.data.image_sets import ImageSet
from gflow_pl.data.unrepeated_sampler import UnrepeatedSampler, even_batch_size

__all__ = ["ImageDataModule"]

Part = Literal["train", "val", "test"]


class ImageDataModule(pl.LightningDataModule):
    """Labelled square colour images in a training and a test set.

    Batches are float images (batch, 3, image_size, image_size) of mean 0.5, std 0.5, and int64 labels (batch,).
    Training batches are shuffled and augmented with torch's global random numbers (``seed_everything``); no loader
    keeps random state of its own over an epoch, so a run can be resumed at any epoch.

    Attributes:
        num_classes: Classes.
        image_size: Side of the images in pixels.
        class_names: Names of the classes, in the order of their labels.

    Args:
        num_classes: Classes.
        image_size: Side of the images in pixels.
        class_names: Names of the classes; none stands for their numbers.
        batch_size: Images in a batch of each process.
        val_fraction: Share of the training images held out for validation, in [0, 1); 0 validates on the test set.
        num_workers: Worker processes of a loader; None chooses.
        seed: Draws the images that are held out.
    """

    augments = True
    """Whether training images are shifted and mirrored."""
    in_memory = True
    """Whether the images are held in memory: batches then come faster without worker processes."""

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
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if not 0 <= val_fraction < 1:
            raise ValueError(
                f"`val_fraction` must be in [0, 1), got {val_fraction}. It is a fraction: for 10% write 0.1."
            )
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"`num_workers` must be at least 0, or null to have it chosen, got {num_workers}.")
        self.num_classes = num_classes
        self.image_size = image_size
        self.class_names = list(class_names) or [str(label) for label in range(num_classes)]
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.num_workers = self._sensible_workers() if num_workers is None else num_workers
        self.seed = seed
        self._parts: dict[Part, ImageSet] = {}

    def load(self, part: Literal["train", "test"]) -> ImageSet:
        """All training or all test images.

        Raises:
            ValueError: They are not there; the text says how to get them.
        """
        raise NotImplementedError

    def check_data(self) -> None:
        """Look whether the data is there, before anything is started.

        Raises:
            ValueError: It is not; the text says how to get it.
        """

    def setup(self, stage: str | None = None) -> None:
        """Load and split the images, once."""
        if self._parts:
            return
        train, test = self.load("train"), self.load("test")
        val = test
        if self.val_fraction > 0:
            num_held_out = round(self.val_fraction * len(train))
            if not 0 < num_held_out < len(train):
                raise ValueError(
                    f"`val_fraction` {self.val_fraction} holds out {num_held_out} of {len(train)} training images: "
                    f"at least one must be on either side."
                )
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
            held_out, left = order[:num_held_out].sort().values, order[num_held_out:].sort().values
            train, val = train.subset(left), train.subset(held_out)
        self._parts = {"train": train, "val": val, "test": test}

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """Shuffled and augmented training batches."""
        return self._loader("train", training=True)

    def plain_train_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """The same training images in order, as they are."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """Validation batches: the images held out, or with ``val_fraction=0`` the test images."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """Test batches."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """The test batches again; `predict_names` says which image each row is."""
        return self._loader("test")

    def predict_names(self) -> list[str]:
        """For each image of `predict_dataloader`, in order: its file (from the data's root), or its position."""
        images = self._part("test")
        return [images.name(index) for index in range(len(images))]

    def _part(self, part: Part) -> ImageSet:
        # The loaders can be had without a Trainer too.
        self.setup()
        return self._parts[part]

    def _loader(self, part: Part, *, training: bool = False) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        rank, num_ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        images, batch_size, sampler = self._part(part), self.batch_size, None
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
            # Workers that lived on would carry random state from epoch to epoch, which no checkpoint holds.
            persistent_workers=False,
        )

    def _sensible_workers(self) -> int:
        if self.in_memory:
            return 0
        # What this process may use can be less than what the machine has (containers, batch systems).
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return min(4, cpus or 1)

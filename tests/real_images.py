"""A few real images (CIFAR-100, ten classes), and functions that write them in the formats of the data modules.

tests/data_files/real_images.npz: ``train`` (10, 5, 32, 32, 3) and ``test`` (10, 2, 32, 32, 3) uint8, class by class;
``labels`` (10,) their labels in CIFAR-100; ``names`` all 100 class names.
"""

from __future__ import annotations

import hashlib
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image

_FILE = Path(__file__).parent / "data_files" / "real_images.npz"


@cache
def _archive() -> dict[str, np.ndarray]:
    with np.load(_FILE, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def class_names() -> list[str]:
    """Return the names of the ten classes, in the order of their labels."""
    archive = _archive()
    return [str(archive["names"][label]) for label in archive["labels"]]


def real_images(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 32, 32, 3) uint8 and labels (N,) 0..9, class by class: 50 for training, 20 for testing."""
    images = _archive()[split]
    return images.reshape(-1, 32, 32, 3).copy(), np.repeat(np.arange(10), images.shape[1])


def write_image_folder(root: Path, *, per_class: int = 5, num_classes: int = 10, scale: int = 1) -> Path:
    """Write the images to root/{train,test}/<class>/NN.png; `scale` enlarges every pixel.

    Returns:
        `root`, as the argument of ImageFolder.
    """
    for split in ("train", "test"):
        for label, name in enumerate(class_names()[:num_classes]):
            folder = Path(root) / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(_archive()[split][label][:per_class]):
                large = image.repeat(scale, axis=0).repeat(scale, axis=1)
                Image.fromarray(large).save(folder / f"{i:02d}.png")
    return Path(root)


def _rows(images: np.ndarray) -> np.ndarray:
    """Return images in the layout of the files: one row for each image, with all red, then all green, then all blue
    values.
    """
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def _write(source, root: Path, files: dict[str, dict], monkeypatch) -> Path:
    """Write pickled batches, and patch torchvision to expect their checksums."""
    folder = Path(root) / source.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    checksums = {}
    for name, content in files.items():
        data = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(data)
        checksums[name] = hashlib.md5(data).hexdigest()
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(source, attribute, [[name, checksums[name]] for name, _ in getattr(source, attribute)])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": checksums[source.meta["filename"]]})
    return Path(root)


def write_cifar10(root: Path, monkeypatch) -> Path:
    """Write the images as CIFAR-10 files: five batches of ten training images, in a fixed random order.

    Returns:
        `root`, as the argument of CIFAR10.
    """
    source = torchvision.datasets.CIFAR10
    images, labels = shuffled("train")
    files = {
        f"data_batch_{k + 1}": {
            "data": _rows(images[k * 10 : k * 10 + 10]),
            "labels": labels[k * 10 : k * 10 + 10].tolist(),
        }
        for k in range(5)
    }
    images, labels = shuffled("test")
    files["test_batch"] = {"data": _rows(images), "labels": labels.tolist()}
    files["batches.meta"] = {"label_names": class_names()}
    return _write(source, root, files, monkeypatch)


def write_cifar100(root: Path, monkeypatch) -> Path:
    """Write the images as CIFAR-100 files, with their labels in CIFAR-100, in a fixed random order.

    Returns:
        `root`, as the argument of CIFAR100.
    """
    files = {}
    for split in ("train", "test"):
        images, labels = shuffled(split)
        fine = _archive()["labels"][labels].tolist()
        files[split] = {"data": _rows(images), "fine_labels": fine, "coarse_labels": [0] * len(fine)}
    files["meta"] = {"fine_label_names": _archive()["names"].tolist(), "coarse_label_names": []}
    return _write(torchvision.datasets.CIFAR100, root, files, monkeypatch)


def shuffled(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return `real_images` in the order in which they are written to CIFAR files."""
    images, labels = real_images(split)
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order], labels[order]

"""Data modules for image classification: loading, splitting and augmentation."""

from __future__ import annotations

from gflow_pl.data.cifar import CIFAR10, CIFAR100
from gflow_pl.data.digits import Digits
from gflow_pl.data.image_folder import ImageFolder

__all__ = ["CIFAR10", "CIFAR100", "Digits", "ImageFolder"]

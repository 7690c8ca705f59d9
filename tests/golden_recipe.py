"""Weights, images and labels of the golden files, drawn from seeded generators.

The golden files contain numbers that the published code computed once on these weights and images. They do not contain
the weights: this module draws them again, tensor by tensor in state-dict order, and checks their sums.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"

# Name of a network in the package -> name in the golden files.
GOLDEN_NAMES = {"vgg13": "vgg", "resnet56": "resnet-56"}


@cache
def golden(file: str) -> dict[str, np.ndarray]:
    """Return all arrays of tests/golden/<file>.npz by name."""
    with np.load(GOLDEN / f"{file}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def _draw(rng: np.random.Generator, kind: str, shape: tuple[int, ...], conv_gain: float) -> np.ndarray:
    if kind == "conv":
        fan_in = int(np.prod(shape[1:]))
        a = rng.uniform(0.6, 1.4)
        b = rng.uniform(0.5, 1.5, size=shape[0])
        w = rng.normal(0, 1, size=shape)
        return w * np.sqrt(conv_gain / fan_in) * a * b[:, None, None, None]
    if kind == "linear_weight":
        return rng.normal(0, 1, size=shape) * np.sqrt(1 / shape[1])
    if kind in ("bn_weight", "bn_var"):
        return rng.uniform(0.5, 1.5, size=shape)
    if kind in ("linear_bias", "bn_bias", "bn_mean"):
        return rng.normal(0, 0.1, size=shape)
    if kind == "bn_count":
        return np.zeros(shape)
    raise KeyError(kind)


def golden_weights(model_name: str, *, init: bool = False) -> dict[str, np.ndarray]:
    """Return the weights as float32 arrays by state-dict name, in the recorded order.

    Args:
        model_name: "vgg13" or "resnet56", or its name in the golden files.
        init: Whether to return the second set of weights, which serves as the weights at initialization.
    """
    record = golden(f"model_{GOLDEN_NAMES.get(model_name, model_name)}")
    rng = np.random.default_rng(int(record["seed_init" if init else "seed"]))
    prefix = "init_" if init else ""
    tensors = {}
    for i, name in enumerate(record["tensor_names"].tolist()):
        shape = tuple(int(n) for n in record["tensor_shapes"][i] if n >= 0)
        kind = str(record["tensor_kinds"][i])
        value = _draw(rng, kind, shape, float(record["conv_gain"])).astype(np.float32)
        exact = value.astype(np.float64)
        # A NumPy release with other random streams fails here, before any score is compared.
        np.testing.assert_allclose(exact.sum(), record[f"{prefix}tensor_sum"][i], rtol=1e-12, atol=1e-12, err_msg=name)
        np.testing.assert_allclose((exact**2).sum(), record[f"{prefix}tensor_sumsq"][i], rtol=1e-12, err_msg=name)
        tensors[name] = value
    return tensors


def load_golden_weights(net: nn.Module, model_name: str, init: bool = False) -> nn.Module:
    """Cast a network to float64 and load the golden weights; names, order and shapes must agree.

    Args:
        net: A network with 10 classes.
        model_name: "vgg13" or "resnet56".
        init: Whether to load the second set of weights.

    Returns:
        The same network, in evaluation mode.
    """
    tensors = golden_weights(model_name, init=init)
    assert list(net.state_dict()) == list(tensors), "tensor names or their order differ from the golden files"
    net.double().eval()
    net.load_state_dict({name: torch.from_numpy(value).double() for name, value in tensors.items()}, strict=True)
    return net


def x_fixed() -> Tensor:
    """Return the batch of the golden logits, (8, 3, 32, 32), float64 (with values of float32 precision)."""
    return torch.from_numpy(np.random.default_rng(11).normal(0, 1, size=(8, 3, 32, 32)).astype(np.float32)).double()


@cache
def _image_set() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(12)
    images = rng.normal(0, 1, size=(160, 3, 32, 32)).astype(np.float32)
    once = np.repeat(np.arange(10), 8)
    labels = np.concatenate([rng.permutation(once), rng.permutation(once)])
    return torch.from_numpy(images).double(), torch.from_numpy(labels)


def golden_images() -> Tensor:
    """Return the images, (160, 3, 32, 32), float64 with values of float32; a batch is 16 consecutive images."""
    return _image_set()[0].clone()


def golden_labels() -> Tensor:
    """Return the labels of the images, (160,) int64; each half contains 8 images of every class."""
    return _image_set()[1].clone()

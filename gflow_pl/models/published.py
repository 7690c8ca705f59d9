"""Weight files of the published code: ``{"net": state_dict with "module." prefix, "cfg": ...}``, pruned or not.

The shapes of a pruned network are those of its tensors, so ``cfg`` is never interpreted. It has to be read though,
since it is part of the pickle, and it holds numpy numbers, which PyTorch's safe loading refuses. Two stand-ins read
them here as plain numbers; nothing of numpy, and nothing else that the file names, is ever called.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["allowed_types", "is_published", "published_shapes", "read_checkpoint", "read_published", "strip_prefix"]

_PREFIX = "module."
# Codes of numpy's numbers -> format characters of `struct`.
_NUMBER_FORMATS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_NUMBER_FORMATS |= {"f2": "e", "f4": "f", "f8": "d"}


class _NumberType:
    """Stands in for ``numpy.dtype``: the code and byte order of a number, nothing more."""

    def __init__(self, code: str, *_flags: bool) -> None:
        if code not in _NUMBER_FORMATS:
            raise pickle.UnpicklingError(f"a numpy value of type {code!r} is no number")
        self.format = _NUMBER_FORMATS[code]
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # The state of a dtype is (version, byte order, ...); "|" and "=" stand for types that have none.
        self.order = ">" if state[1] == ">" else "<"


def _number(kind: _NumberType, data: bytes) -> int | float | bool:
    """Stands in for numpy's function that makes a scalar of its bytes."""
    return struct.unpack(kind.order + kind.format, data)[0]


# The module was renamed in numpy 2; both names occur in files.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def allowed_types() -> AbstractContextManager[None]:
    """Within, ``torch.load(..., weights_only=True)`` reads numpy numbers too, as plain ones."""
    return torch.serialization.safe_globals(_STAND_INS)


def read_checkpoint(path: str | Path) -> Any:
    """The contents of a checkpoint file, tensors on the CPU; no code that the file names is run.

    Args:
        path: A file written by ``torch.save``: tensors, plain data and numpy numbers (which become plain ones).

    Raises:
        ValueError: There is no such file, it is damaged, or it holds anything else, code above all.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Checkpoint '{path}' does not exist or is no file: give the path of a .ckpt or .pth file.")
    try:
        with allowed_types():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged pickle can fail in any way; whichever it is, the file is not usable.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise ValueError(
                f"Checkpoint '{path}' holds code ({code[1]}) beside its weights and was refused: "
                f"only tensors and plain data are loaded."
            ) from error
        raise ValueError(
            f"Checkpoint '{path}' could not be read ({type(error).__name__}): it is truncated or no checkpoint."
        ) from error


def is_published(checkpoint: Any) -> bool:
    """Whether the contents of a file are a weight file of the published code.

    Args:
        checkpoint: What `read_checkpoint` (or ``torch.load``) gave.
    """
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("net"), Mapping):
        return False
    net = checkpoint["net"]
    return bool(net) and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in net.items())


def strip_prefix(checkpoint: Any) -> dict[str, Tensor]:
    """The state dict in the contents of a published weight file, without the prefix of its DataParallel wrapper.

    Args:
        checkpoint: What `read_checkpoint` gave.

    Raises:
        ValueError: The contents are not those of a published weight file.
    """
    if not is_published(checkpoint):
        keys = isinstance(checkpoint, Mapping) and f"the keys {sorted(map(str, checkpoint))[:8]}"
        raise ValueError(
            f"The checkpoint is no weight file of the published code: expected a state dict under 'net', found "
            f"{keys or type(checkpoint).__name__}."
        )
    net = checkpoint["net"]
    wrapped = all(name.startswith(_PREFIX) for name in net)
    return {name.removeprefix(_PREFIX) if wrapped else name: value for name, value in net.items()}


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a weight file of the published code, tensors on the CPU.

    Args:
        path: The file.

    Raises:
        ValueError: The file cannot be read, or is none of the published code.
    """
    return strip_prefix(read_checkpoint(path))


def published_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a state dict by name: all that is needed to rebuild a pruned network.

    Filters that the published code zeroed (second convs and shortcuts of its ResNets) are in their full shape.

    Args:
        state: What `read_published` gave.
    """
    return {name: tuple(tensor.shape) for name, tensor in state.items()}

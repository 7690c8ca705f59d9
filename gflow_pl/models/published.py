"""Weight files of the published code: ``{"net": state_dict with "module." prefix, "cfg": ...}``, pruned or not.

The shapes of a pruned network follow from its tensors, so the contents of ``cfg`` are not used. It must be read all the
same, because it is part of the pickle, and it contains numpy numbers, which ``torch.load(..., weights_only=True)``
refuses. Two substitutes for numpy's types, defined here, unpickle them as plain numbers. No code of numpy and no other
code is run.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from gflow_pl.common.errors import SettingsError

__all__ = ["is_published", "read_checkpoint", "strip_prefix"]

_PREFIX = "module."
# Type codes of numpy to format characters of `struct`.
_NUMBER_FORMATS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_NUMBER_FORMATS |= {"f2": "e", "f4": "f", "f8": "d"}


class _NumberType:
    """Substitute for ``numpy.dtype`` with the format and the byte order of a number.

    The pickle calls it like ``numpy.dtype``.

    Args:
        code: Type code of numpy, such as "i8".
    """

    def __init__(self, code: str, *_align_and_copy: bool) -> None:
        if code not in _NUMBER_FORMATS:
            raise pickle.UnpicklingError(f"a numpy value of type {code!r} is not a number")
        self.format = _NUMBER_FORMATS[code]
        self.order = "<"

    def __setstate__(self, state: tuple[object, ...]) -> None:
        # The state of a dtype is (version, byte order, ...). "|" and "=" mean native order.
        self.order = ">" if state[1] == ">" else "<"


def _unpickle_number(number_type: _NumberType, data: bytes) -> int | float | bool:
    """Substitute for the numpy function that unpickles a scalar: return the number that `data` contains."""
    return struct.unpack(number_type.order + number_type.format, data)[0]


# numpy 2 renamed the module of `scalar`. Files contain either name.
_SUBSTITUTES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_NumberType, "numpy.dtype"),
    (_unpickle_number, "numpy.core.multiarray.scalar"),
    (_unpickle_number, "numpy._core.multiarray.scalar"),
]


def read_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint file without running any code that it may contain. Tensors are loaded to the CPU.

    Args:
        path: A file written by ``torch.save`` with tensors, plain data and numpy numbers, which become plain numbers.

    Raises:
        SettingsError: The file does not exist, is damaged, or contains anything else, such as code.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingsError(f"Checkpoint '{path}' does not exist or is no file: give the path of a .ckpt or .pth file.")
    try:
        with torch.serialization.safe_globals(_SUBSTITUTES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise any exception
        code = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise SettingsError(
                f"Checkpoint '{path}' holds code ({code[1]}) beside its weights and was refused: "
                f"only tensors and plain data are loaded."
            ) from error
        raise SettingsError(
            f"Checkpoint '{path}' could not be read ({type(error).__name__}): it is truncated or no checkpoint."
        ) from error


def is_published(checkpoint: object) -> TypeGuard[Mapping[str, Any]]:
    """Return whether the contents of a file are those of a weight file of the published code.

    Args:
        checkpoint: Result of `read_checkpoint`.
    """
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("net"), Mapping):
        return False
    net = checkpoint["net"]
    return bool(net) and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in net.items())


def strip_prefix(checkpoint: object) -> dict[str, Tensor]:
    """Return the state dict in a weight file of the published code, without the prefix of its DataParallel wrapper.

    Args:
        checkpoint: Result of `read_checkpoint`.

    Raises:
        SettingsError: The contents are not those of a published weight file.
    """
    if not is_published(checkpoint):
        keys = isinstance(checkpoint, Mapping) and f"the keys {sorted(map(str, checkpoint))[:8]}"
        raise SettingsError(
            f"The checkpoint is no weight file of the published code: expected a state dict under 'net', found "
            f"{keys or type(checkpoint).__name__}."
        )
    net = checkpoint["net"]
    wrapped = all(name.startswith(_PREFIX) for name in net)
    return {name.removeprefix(_PREFIX) if wrapped else name: value for name, value in net.items()}

"""Read checkpoint files: no code in them runs, and a damaged file is noticed.

Files of the published code contain numpy numbers, which ``torch.load(..., weights_only=True)`` refuses. Two substitutes
for numpy's types, defined here, unpickle them as plain numbers. No code of numpy and no other code is run.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from gflow_pl.common.errors import SettingsError

__all__ = ["read_checkpoint"]

# Type codes of numpy to format characters of `struct`.
_NUMBER_FORMATS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_NUMBER_FORMATS |= {"f2": "e", "f4": "f", "f8": "d"}


class _NoFileError(SettingsError, FileNotFoundError):
    """A checkpoint does not exist."""


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


def read_checkpoint(path: str | os.PathLike[str] | IO[bytes], map_location: Any = "cpu") -> Any:
    """Read a checkpoint file without running any code that it may contain.

    The checksums of the archive are compared with its contents first, which ``torch.load`` does not do.

    Args:
        path: A file written by ``torch.save`` with tensors, plain data and numpy numbers, which become plain numbers;
            or such a file that is open for reading. It is read from its start, and left there.
        map_location: Device that the tensors are loaded to, as in ``torch.load``.

    Raises:
        SettingsError: The file does not exist, is damaged, or contains anything else, such as code.
    """
    file: Path | IO[bytes] = Path(path) if isinstance(path, (str, os.PathLike)) else path
    if isinstance(file, Path) and not file.is_file():
        raise _NoFileError(f"Checkpoint '{path}' does not exist or is no file: give the path of a .ckpt or .pth file.")
    try:
        _check_archive(file)
        with torch.serialization.safe_globals(_SUBSTITUTES):
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # a damaged pickle may raise any exception
        code = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise SettingsError(
                f"Checkpoint '{path}' holds code ({code[1]}) beside its weights and was refused: "
                f"only tensors and plain data are loaded."
            ) from error
        raise SettingsError(
            f"Checkpoint '{path}' could not be read ({type(error).__name__}): it is damaged or no checkpoint."
        ) from error
    finally:
        if not isinstance(file, Path):
            file.seek(0)


def _check_archive(file: Path | IO[bytes]) -> None:
    """Raise if the contents of a zip archive, which `torch.save` writes, differ from their checksums."""
    if not zipfile.is_zipfile(file):
        return  # a file of an early release of torch: one pickle, without checksums
    with zipfile.ZipFile(file) as archive:
        compressed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
        damaged = compressed[0] if compressed else archive.testzip()  # torch compresses nothing
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)
    if not isinstance(file, Path):
        file.seek(0)

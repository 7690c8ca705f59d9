"""Where in the user's code an operator is called."""

from __future__ import annotations

import os
import sys
from types import FrameType

import torch

import gflow_pl.common

__all__ = ["CodeLocation", "code_location"]

CodeLocation = tuple[tuple[str, int | str], ...]
"""File, and line or function, of every frame of the user's code, innermost first."""

_TORCH = os.path.dirname(torch.__file__) + os.sep
_TORCH_NN = os.path.join(_TORCH, "nn") + os.sep
_MODULE_CALL = os.path.join(_TORCH_NN, "modules", "module.py")
_TRACER = (os.path.dirname(__file__) + os.sep, os.path.dirname(gflow_pl.common.__file__) + os.sep)


def code_location(*, innermost_line: bool = True) -> CodeLocation:
    """Return the location of the running code in the user's files.

    Blocks of one class share their locations, so that a finding about one block applies to all of them. Frames of torch
    are left out, except those of the layers in ``torch.nn``, and so are frames of the tracer.

    Args:
        innermost_line: Whether to distinguish the lines of the innermost function. If False, its name takes the place
            of the line, and all operators that it calls directly have the same location.
    """
    frames: list[tuple[str, int | str]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        is_layer = file.startswith(_TORCH_NN) and file != _MODULE_CALL
        if not file.startswith(_TRACER) and (is_layer or not file.startswith(_TORCH)):
            frames.append((file, frame.f_lineno if innermost_line or frames else frame.f_code.co_name))
        frame = frame.f_back
    return tuple(frames)

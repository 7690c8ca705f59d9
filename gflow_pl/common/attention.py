"""Attention without its fused inference kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["attention_fast_path_disabled"]


@contextmanager
def attention_fast_path_disabled() -> Iterator[None]:
    """Disable the fast path of `nn.MultiheadAttention` and `nn.TransformerEncoder`, and restore it afterwards.

    In evaluation mode these layers call one fused operator, which hides their matrix products and has no second
    derivative.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)

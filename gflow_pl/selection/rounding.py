"""Counts from products of floats, which must not be off by one because of a rounding error."""

from __future__ import annotations

import math

__all__ = ["ceil_count", "floor_count"]

_TOLERANCE = 1e-9


def floor_count(product: float) -> int:
    """Return the largest whole number up to a product, with a tolerance of 1e-9.

    A product that is a whole number in exact arithmetic may come out slightly lower in floating point.

    Example:
        >>> 0.29 * 100, floor_count(0.29 * 100)
        (28.999999999999996, 29)
    """
    return math.floor(product + _TOLERANCE)


def ceil_count(product: float) -> int:
    """Return the smallest whole number from a product on, with a tolerance of 1e-9.

    Example:
        >>> 0.07 * 100, ceil_count(0.07 * 100)
        (7.000000000000001, 7)
    """
    return math.ceil(product - _TOLERANCE)

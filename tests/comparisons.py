"""Comparison of nested results."""

import torch


def assert_identical(actual: object, expected: object, where: str = "result") -> None:
    """Assert that two values are equal to the last bit, types, dtypes and the order of dict keys included.

    Args:
        actual: A tensor, a plain value, or dicts, lists and tuples of them in any depth.
        expected: What it is compared with.
        where: How messages name the value; keys and positions are appended.
    """
    assert type(actual) is type(expected), where
    if isinstance(actual, torch.Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), where
    elif isinstance(actual, dict):
        assert list(actual) == list(expected), where
        for key in actual:
            assert_identical(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected), where
        for position, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_identical(a, b, f"{where}[{position}]")
    else:
        assert actual == expected, f"{where}: {actual!r} {expected!r}"

"""Output shapes of operators on meta tensors, computed once for every kind of input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["ShapeCache"]

Template: TypeAlias = "Tensor | list[Template]"
"""A meta tensor with the shape, strides and dtype of an output, or a list of them."""
ShapeFunction = Callable[..., "Template | None"]
"""Computes the template of an operator's output from its positional arguments; None if torch has to be called."""


class ShapeCache:
    """Runs operators on meta tensors, and remembers the shapes of their outputs by the shapes of their inputs.

    Networks repeat their blocks and a trace repeats the forward, so most calls are repetitions. Only operators whose
    outputs share no memory with their inputs are remembered; views and in-place writes always run. For the most
    frequent operators, functions in this file compute the shapes: torch's meta kernels are Python programs of many
    operators, and slower. Where the arguments are unusual, these functions return None, and torch is called after all,
    which also raises its own errors for arguments that do not fit.
    """

    def __init__(self) -> None:
        self._templates: dict[object, Template | None] = {}
        self._traits: dict[OpOverload, _OperatorTraits] = {}

    def compute(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operator returns for these arguments on the meta device.

        Raises:
            RuntimeError: The arguments do not fit; or any other error that torch raises.
        """
        traits = self._traits.get(func)
        if traits is None:
            traits = self._traits[func] = _OperatorTraits.of(func)
        if traits.keeps_shape is not None and traits.keeps_shape(*args):
            return args[0]
        if not traits.returns_new:
            return func(*args, **kwargs)

        # The same operator with inputs of the same shapes.
        try:
            key = (func, _key(args), _key(kwargs.items()) if kwargs else None)
            template = self._templates.get(key)
        except (TypeError, RuntimeError):  # an argument that is not hashable, or a tensor without strides
            return func(*args, **kwargs)
        if template is None and traits.shape_function is not None and not kwargs:
            template = self._templates[key] = traits.shape_function(*args)
        if template is not None:
            return _from_template(template)

        output = func(*args, **kwargs)
        self._templates[key] = _template_of(output)
        return output


class _OperatorTraits(NamedTuple):
    """What is known of an operator before it is called.

    Attributes:
        keeps_shape: For in-place operators: returns whether, for these arguments, the first one is returned unchanged
            in shape, so that nothing has to be computed.
        returns_new: Whether its outputs share no memory with its inputs.
        shape_function: Computes the template of its output, or None.
    """

    keeps_shape: Callable[..., bool] | None
    returns_new: bool
    shape_function: ShapeFunction | None

    @classmethod
    def of(cls, func: OpOverload) -> _OperatorTraits:
        """Return the traits of an operator."""
        schema = func._schema
        has_no_alias = all(part.alias_info is None for part in (*schema.arguments, *schema.returns))
        # A batch norm writes to its running statistics, but returns new tensors.
        returns_new = has_no_alias or schema.name in _BATCH_NORMS
        return cls(_IN_PLACE.get(schema.name), returns_new, _SHAPE_FUNCTIONS.get(schema.name))


def _key(values: Iterable[Any]) -> tuple[object, ...]:
    """Return what decides the shapes of outputs: shape, strides and dtype of tensors, and all other arguments."""
    key: list[object] = []
    for value in values:
        cls = value.__class__
        if cls is int or cls is bool or value is None:
            key.append((cls, value))
        elif isinstance(value, Tensor):
            key.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            key.append(_key(value))
        else:
            key.append((cls, value))
    return tuple(key)


def _template_of(output: object) -> Template | None:
    """Return a template of an output; None if the output is not made of strided meta tensors only."""
    if isinstance(output, Tensor):
        if not output.is_meta or output.layout != torch.strided:
            return None
        return torch.empty_strided(output.shape, output.stride(), dtype=output.dtype, device="meta")
    if isinstance(output, (list, tuple)):
        templates = [template for part in output if (template := _template_of(part)) is not None]
        return templates if len(templates) == len(output) else None
    return None


def _from_template(template: Template) -> Any:
    """Return a new output. Meta tensors hold no values, so sharing the template's (empty) storage has no effect."""
    if isinstance(template, list):
        return tuple([_from_template(part) for part in template])
    return template.detach()


# -- shape functions: None where the arguments are unusual -------------------------------------------------------------


def _contiguous(shape: Sequence[int], dtype: torch.dtype) -> Template:
    """Return the template of a contiguous tensor."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _unary(x: Tensor, *others: object) -> Template | None:
    """Activation functions: every element of the output depends on one element of the input."""
    if any(isinstance(other, Tensor) for other in others) or not x.is_floating_point():
        return None
    return _contiguous(x.shape, x.dtype) if x.is_contiguous() else None


def _arithmetic(a: object, b: object, *more: object) -> Template | None:
    """Sums, differences, products and quotients, with broadcasting between tensors of equal dtype and rank."""
    if not isinstance(a, Tensor) or not a.is_floating_point() or not a.is_contiguous():
        return None
    if not isinstance(b, Tensor):
        return None if isinstance(b, complex) else _contiguous(a.shape, a.dtype)
    if a.ndim != b.ndim or a.dtype != b.dtype or not b.is_contiguous():
        return None
    shape = [m if n == 1 else n for m, n in zip(a.shape, b.shape, strict=True)]
    fits = all(m in (1, s) and n in (1, s) for m, n, s in zip(a.shape, b.shape, shape, strict=True))
    return _contiguous(shape, a.dtype) if fits else None


def _arithmetic_keeps_shape(x: Tensor, other: object, *more: object) -> bool:
    """Return whether in-place arithmetic is certain to succeed: with a number, or a tensor of equal shape and dtype."""
    if isinstance(other, Tensor):
        return other.shape == x.shape and other.dtype == x.dtype and x.is_floating_point()
    return (
        isinstance(other, (int, float)) if x.is_floating_point() else x.dtype == torch.int64 and isinstance(other, int)
    )


def _batch_norm(x: Tensor, *vectors: object) -> Template | None:
    """Batch norms: output, and mean and inverse standard deviation of every channel."""
    given = [vector for vector in vectors if isinstance(vector, Tensor)]
    if not x.is_contiguous() or any(vector.shape != x.shape[1:2] for vector in given):
        return None
    return [
        _contiguous(x.shape, x.dtype),
        *(_contiguous(x.shape[1:2], given[0].dtype if given else x.dtype) for _ in range(2)),
    ]


def _layer_norm(x: Tensor, shape: Sequence[int], *vectors: object) -> Template | None:
    """Layer norms: output, and mean and inverse standard deviation of every row."""
    first = x.ndim - len(shape)
    fits = tuple(x.shape[first:]) == tuple(shape) and first >= 0
    fits = fits and all(tuple(vector.shape) == tuple(shape) for vector in vectors if isinstance(vector, Tensor))
    if not fits or not x.is_contiguous() or x.dtype not in (torch.float32, torch.float64):
        return None
    moments = _contiguous([*x.shape[:first], *[1] * len(shape)], x.dtype)
    return [_contiguous(x.shape, x.dtype), moments, moments]


def _mean(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False) -> Template | None:
    """Means over some dimensions."""
    if not dims or not x.is_floating_point() or not x.is_contiguous():
        return None
    reduced = {dim % x.ndim for dim in dims if -x.ndim <= dim < x.ndim}
    if len(reduced) != len(dims):
        return None
    return _contiguous(
        [1 if d in reduced else n for d, n in enumerate(x.shape) if keepdim or d not in reduced], x.dtype
    )


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Template | None:
    """Convolutions, except transposed ones."""
    num_spatial = x.ndim - 2
    is_usual = not transposed and num_spatial > 0 and len(stride) == len(padding) == len(dilation) == num_spatial
    if not is_usual or weight.ndim != x.ndim or weight.dtype != x.dtype or not x.is_contiguous():
        return None
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups or not weight.shape[1]:
        return None
    if (bias is not None and bias.shape != weight.shape[:1]) or not weight.is_contiguous():
        return None
    geometry = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
    return _contiguous([x.shape[0], weight.shape[0], *sizes], x.dtype) if min(sizes) > 0 else None


def _matrix_product(bias: Tensor | None, a: Tensor, b: Tensor, *more: object) -> Template | None:
    """Products of two matrices, with or without a bias."""
    fits = not more and a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype
    if not fits or (bias is not None and (bias.shape != b.shape[1:] or bias.dtype != a.dtype)):
        return None
    return _contiguous([a.shape[0], b.shape[1]], a.dtype)


_BATCH_NORMS = frozenset(
    f"aten::{name}"
    for name in ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
)
_UNARY = "hardtanh hardswish hardsigmoid leaky_relu elu gelu silu mish relu relu6 sigmoid tanh".split()  # noqa: SIM905
_IN_PLACE: dict[str, Callable[..., bool]] = {
    **{f"aten::{name}_": lambda x, *others: x.is_floating_point() for name in _UNARY},
    **{f"aten::{name}_": _arithmetic_keeps_shape for name in ("add", "sub", "mul")},
}
_SHAPE_FUNCTIONS: dict[str, ShapeFunction] = {
    **{f"aten::{name}": _unary for name in _UNARY},
    **{f"aten::{name}": _arithmetic for name in ("add", "sub", "mul", "div")},
    **dict.fromkeys(_BATCH_NORMS, _batch_norm),
    "aten::native_layer_norm": _layer_norm,
    "aten::mean": _mean,
    "aten::convolution": _convolution,
    "aten::addmm": _matrix_product,
    "aten::mm": lambda a, b, *more: _matrix_product(None, a, b, *more),
}

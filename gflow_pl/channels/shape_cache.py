"""What ops put out when nothing is computed: the shapes, asked of torch once for every kind of input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Shapes"]

Likeness = Any  # a tensor, or a list of such
Told = Callable[..., Likeness | None]


class Shapes:
    """Runs ops on meta tensors, and remembers what came out for inputs of the same shapes and the same arguments.

    Networks repeat their blocks, and a trace its forwards, so that most questions were asked before. Only ops whose outputs
    share no memory with their inputs are remembered; views and writes are always run. Of the ops that most networks are made
    of, the shapes are known without asking (torch's own answers are Python programs of many ops); where the arguments are
    anything but ordinary, torch is asked all the same, and says what does not fit.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Likeness] = {}
        self._facts: dict[Any, _Facts] = {}

    def computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the op gives for these arguments, on the meta device.

        Raises:
            RuntimeError: Or whatever else the op says of arguments that do not fit.
        """
        facts = self._facts.get(func)
        if facts is None:
            facts = self._facts[func] = _Facts.of(func)
        if facts.keeps_first is not None and facts.keeps_first(*args):
            return args[0]
        if not facts.makes_fresh:
            return func(*args, **kwargs)
        try:
            question = (func, _key(args), _key(kwargs.items()) if kwargs else None)
            known = self._known.get(question)
        except (TypeError, RuntimeError):  # an argument that cannot be compared, a tensor without strides
            return func(*args, **kwargs)
        if known is None and facts.told is not None and not kwargs:
            known = self._known[question] = facts.told(*args)
        if known is not None:
            return _made(known)
        out = func(*args, **kwargs)
        self._known[question] = _likeness(out)
        return out


class _Facts(NamedTuple):
    """What is known of an op beforehand.

    Attributes:
        keeps_first: What tells whether it does no more than write into its first argument, and return it.
        makes_fresh: Whether all that it puts out is new.
        told: What tells its shapes.
    """

    keeps_first: Callable[..., bool] | None
    makes_fresh: bool
    told: Told | None

    @classmethod
    def of(cls, func: Any) -> _Facts:
        schema = func._schema
        fresh = all(part.alias_info is None for part in (*schema.arguments, *schema.returns))
        return cls(_IN_PLACE.get(schema.name), fresh or schema.name in _NORMS, _TOLD.get(schema.name))


def _key(values: Any) -> tuple[Any, ...]:
    """What decides the outputs' shapes: shapes, layouts and types of tensors, and all the rest as it is."""
    key: list[Any] = []
    for value in values:
        kind = value.__class__
        if kind is int or kind is bool or value is None:
            key.append((kind, value))
        elif isinstance(value, Tensor):
            key.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            key.append(_key(value))
        else:
            key.append((kind, value))
    return tuple(key)


def _likeness(out: Any) -> Likeness | None:
    """What is needed to make such an output again; None where it is not made of new strided tensors alone."""
    if isinstance(out, Tensor):
        usual = out.is_meta and out.layout == torch.strided
        return torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta") if usual else None
    if isinstance(out, (list, tuple)):
        parts = [_likeness(part) for part in out]
        return None if any(part is None for part in parts) else parts
    return None


def _made(likeness: Likeness) -> Any:
    """Tensors without contents share nothing but their shape with the one that they are aliases of."""
    if isinstance(likeness, list):
        return tuple([_made(part) for part in likeness])
    return likeness.detach()


# -- shapes that are known without asking; None where the arguments are not the ordinary ones ---------------------------


def _plain(shape: Sequence[int], dtype: torch.dtype) -> Likeness:
    """A contiguous tensor."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _same(x: Tensor, *others: Any) -> Likeness | None:
    """A function of every element by itself."""
    if any(isinstance(other, Tensor) for other in others) or not x.is_floating_point():
        return None
    return _plain(x.shape, x.dtype) if x.is_contiguous() else None


def _arithmetic(a: Any, b: Any, *more: Any) -> Likeness | None:
    if not isinstance(a, Tensor) or not a.is_floating_point() or not a.is_contiguous():
        return None
    if not isinstance(b, Tensor):
        return None if isinstance(b, complex) else _plain(a.shape, a.dtype)
    if a.ndim != b.ndim or a.dtype != b.dtype or not b.is_contiguous():
        return None
    shape = [m if n == 1 else n for m, n in zip(a.shape, b.shape, strict=True)]
    fits = all(m in (1, s) and n in (1, s) for m, n, s in zip(a.shape, b.shape, shape, strict=True))
    return _plain(shape, a.dtype) if fits else None


def _takes(x: Tensor, other: Any, *more: Any) -> bool:
    """Whether arithmetic in place goes without saying: a number, or a tensor of the same kind."""
    if isinstance(other, Tensor):
        return other.shape == x.shape and other.dtype == x.dtype and x.is_floating_point()
    return (
        isinstance(other, (int, float)) if x.is_floating_point() else x.dtype == torch.int64 and isinstance(other, int)
    )


def _batch_norm(x: Tensor, *vectors: Any) -> Likeness | None:
    given = [vector for vector in vectors if isinstance(vector, Tensor)]
    if not x.is_contiguous() or any(vector.shape != x.shape[1:2] for vector in given):
        return None
    return [_plain(x.shape, x.dtype), *(_plain(x.shape[1:2], given[0].dtype if given else x.dtype) for _ in range(2))]


def _layer_norm(x: Tensor, shape: Sequence[int], *vectors: Any) -> Likeness | None:
    first = x.ndim - len(shape)
    fits = tuple(x.shape[first:]) == tuple(shape) and first >= 0
    fits = fits and all(tuple(vector.shape) == tuple(shape) for vector in vectors if isinstance(vector, Tensor))
    if not fits or not x.is_contiguous() or x.dtype not in (torch.float32, torch.float64):
        return None
    moments = _plain([*x.shape[:first], *[1] * len(shape)], x.dtype)
    return [_plain(x.shape, x.dtype), moments, moments]


def _mean(x: Tensor, dims: Sequence[int] | None = None, keep: bool = False) -> Likeness | None:
    if not dims or not x.is_floating_point() or not x.is_contiguous():
        return None
    gone = {dim % x.ndim for dim in dims if -x.ndim <= dim < x.ndim}
    if len(gone) != len(dims):
        return None
    return _plain([1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone], x.dtype)


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
) -> Likeness | None:
    sides = x.ndim - 2
    ordinary = not transposed and sides > 0 and len(stride) == len(padding) == len(dilation) == sides
    if not ordinary or weight.ndim != x.ndim or weight.dtype != x.dtype or not x.is_contiguous():
        return None
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups or not weight.shape[1]:
        return None
    if (bias is not None and bias.shape != weight.shape[:1]) or not weight.is_contiguous():
        return None
    geometry = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    moved = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
    return _plain([x.shape[0], weight.shape[0], *moved], x.dtype) if min(moved) > 0 else None


def _product(bias: Tensor | None, a: Tensor, b: Tensor, *more: Any) -> Likeness | None:
    fits = not more and a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype
    if not fits or (bias is not None and (bias.shape != b.shape[1:] or bias.dtype != a.dtype)):
        return None
    return _plain([a.shape[0], b.shape[1]], a.dtype)


_NORMS = frozenset(
    f"aten::{name}"
    for name in ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
)
_UNARY = "hardtanh hardswish hardsigmoid leaky_relu elu gelu silu mish relu relu6 sigmoid tanh".split()  # noqa: SIM905
_IN_PLACE: dict[str, Callable[..., bool]] = {
    **{f"aten::{name}_": lambda x, *others: x.is_floating_point() for name in _UNARY},
    **{f"aten::{name}_": _takes for name in ("add", "sub", "mul")},
}
_TOLD: dict[str, Told] = {
    **{f"aten::{name}": _same for name in _UNARY},
    **{f"aten::{name}": _arithmetic for name in ("add", "sub", "mul", "div")},
    **dict.fromkeys(_NORMS, _batch_norm),
    "aten::native_layer_norm": _layer_norm,
    "aten::mean": _mean,
    "aten::convolution": _convolution,
    "aten::addmm": _product,
    "aten::mm": lambda a, b, *more: _product(None, a, b, *more),
}

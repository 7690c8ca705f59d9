"""The rule of operators that do the same to every tensor of a list, by which averages of weights are updated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from gflow_pl.channels.rules.elementwise import elementwise
from gflow_pl.channels.rules.operator_call import OperatorCall
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["TENSOR_LIST_RULES"]

_PREFIX = "_foreach_"


def _foreach(op: OperatorCall) -> None:
    """Label the outputs of ``_foreach_add_(xs, ys)`` and others: tensor i follows from tensor i of every list.

    The variants that write in place return nothing; their outputs are the tensors of the first list.
    """
    targets = next(value for value in op.args if _is_tensor_list(value))
    outputs = op.outputs or [*targets]
    for i, output in enumerate(outputs):
        args = tuple(value[i] if _is_list_of(value, len(targets)) else value for value in op.args)
        operands = [value for value in args if isinstance(value, Tensor)]
        elementwise(replace(op, name=op.name.removeprefix(_PREFIX), args=args, operands=operands, output=output))


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor)


def _is_list_of(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


TENSOR_LIST_RULES = rule_table(
    {
        _foreach: " ".join(
            _PREFIX + name
            for name in """add sub mul div addcmul addcdiv lerp copy pow maximum minimum clamp_max clamp_min zero neg
            abs sqrt rsqrt reciprocal exp expm1 log log1p log2 log10 sign sigmoid sin cos tan sinh cosh tanh asin acos
            atan erf erfc lgamma ceil floor round trunc frac""".split()  # noqa: SIM905
        )
    }
)

"""Rules of operators that create tensors or copy one, and the rule of unknown operators."""

from __future__ import annotations

from gflow_pl.channels.rules.elementwise import note_partial_write
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["CREATION_RULES", "unknown"]


def _create_like(op: OperatorCall) -> None:
    """Label the output of ``zeros_like(x)``, ``rand_like(x)`` and others: a new tensor with the shape of x."""
    info = op.info(op.operands[0])
    zero_dims = range(op.output.ndim) if op.name == "zeros_like" else ()
    op.set_labels(op.output, info.labels, zero_dims, info.is_uniform)


def _create_uniform(op: OperatorCall) -> None:
    """Label the output of ``zeros(sizes)``, ``full(sizes, value)`` and others: all elements are equal.

    The sizes follow the channels that the tensor meets later. The verification of the trace finds out whether they do.
    """
    op.set_labels(op.output, [None] * op.output.ndim, is_uniform=True)


def _create(op: OperatorCall) -> None:
    """Label the output of ``arange(n)``, ``randn(sizes)`` and others: None, no channel, in every dimension.

    The sizes are plain numbers. Whether a size is the number of some channels is found out by the verification.
    """
    for output in op.outputs:
        op.set_labels(output, [None] * output.ndim)


def _copy(op: OperatorCall) -> None:
    """Label the output of ``clone(x)``, ``contiguous(x)``, ``to(x, dtype)`` and others, with the labels of x."""
    info = op.info(op.operands[0])
    op.set_labels(op.output, info.labels, info.zero_dims, info.is_uniform)


def _restride(op: OperatorCall) -> None:
    """Label the output of ``as_strided(x, sizes, strides)``.

    The in-place variant with the sizes of x changes the memory layout only. Other uses are not followed.
    """
    x = op.operands[0]
    if tuple(op.args[1]) == tuple(x.shape) and op.name == "as_strided_":
        _copy(op)
    else:
        unknown(op)


def _fill(op: OperatorCall) -> None:
    """Label the output of ``zero_(x)``, ``fill_(x, value)``, ``normal_(x)`` and others.

    The output has the same positions with new values.
    """
    note_partial_write(op)
    info = op.info(op.operands[0])
    op.set_labels(op.output, info.labels, (), info.is_uniform)


def unknown(op: OperatorCall) -> None:
    """Freeze all channels that reach an operator without a rule; its new outputs have no labels."""
    for x in op.operands:
        for vector in op.info(x).labels:
            op.freeze(vector, f"no rule for the operator '{op.name}'; gflow_pl.register_rule adds one")
    for output in op.outputs:
        if not any(output is x for x in op.operands):
            op.set_labels(output, [None] * output.ndim)
        else:  # written in place, with values that may differ from element to element
            whole = output if output._base is None else output._base
            op.info(output).is_uniform = op.info(whole).is_uniform = False


_NAMES: dict[Rule, str] = {
    _create_like: "zeros_like ones_like empty_like full_like rand_like randn_like bernoulli",
    _create_uniform: "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor",
    _create: "arange rand randn randint randperm linspace eye tril_indices empty_strided new_empty_strided",
    _copy: "detach alias clone contiguous _to_copy to lift_fresh lift resolve_conj resolve_neg",
    _restride: "as_strided as_strided_",
    _fill: "zero_ fill_ bernoulli_ uniform_ normal_ random_ exponential_",
}
CREATION_RULES = rule_table(_NAMES)

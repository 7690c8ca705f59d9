"""Rules of losses, which a forward may compute itself."""

from __future__ import annotations

from gflow_pl.channels.rules.elementwise import elementwise
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.rule_table import rule_table

__all__ = ["LOSS_RULES"]


def _class_loss(op: OperatorCall) -> None:
    """Label the outputs of ``nll_loss_forward(scores, target, ...)`` and others: every class is needed."""
    for tensor in op.operands:
        for vector in op.info(tensor).labels:
            op.freeze(vector, "the class scores of a loss")
    for output in op.outputs:
        op.set_labels(output, [None] * output.ndim)


def _difference(op: OperatorCall) -> None:
    """Label the output of ``mse_loss(x, target, reduction)`` and others, which compare position by position.

    A mean over the positions (or their sum, where a loss of zeros is not zero) changes with the number of channels.
    """
    x = op.operands[0]
    if op.output.ndim == x.ndim and op.output.shape == x.shape:
        elementwise(op)
        return
    for dim in range(x.ndim):
        vectors = [op.info(y).labels[dim] for y in op.operands if y.ndim == x.ndim and y.shape[dim] == x.shape[dim]]
        for vector in vectors[1:]:
            op.match(vectors[0], vector, "is compared with a tensor whose channels are not known")
        op.mark_inexact(vectors[0], f"'{op.name}' over the pruned dim")
    for output in op.outputs:
        op.set_labels(output, [None] * output.ndim)


_NAMES: dict[Rule, str] = {
    _class_loss: """nll_loss_forward nll_loss2d_forward nll_loss nll_loss_nd nll_loss2d multi_margin_loss
        multilabel_margin_loss_forward _ctc_loss""",
    _difference: """mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy kl_div
        binary_cross_entropy_with_logits""",
}
LOSS_RULES = rule_table(_NAMES)

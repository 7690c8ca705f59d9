"""The rules of all operators, and the way to add one."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch

from gflow_pl.channels.rules.convolutions import CONVOLUTION_RULES
from gflow_pl.channels.rules.creation import CREATION_RULES
from gflow_pl.channels.rules.dimensions import DIMENSION_RULES
from gflow_pl.channels.rules.elementwise import ELEMENTWISE_RULES
from gflow_pl.channels.rules.indexing import INDEXING_RULES
from gflow_pl.channels.rules.joining import JOINING_RULES
from gflow_pl.channels.rules.losses import LOSS_RULES
from gflow_pl.channels.rules.norms import NORM_RULES
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.products import PRODUCT_RULES
from gflow_pl.channels.rules.rearranging import REARRANGING_RULES
from gflow_pl.channels.rules.reductions import REDUCTION_RULES
from gflow_pl.channels.rules.scattering import SCATTERING_RULES
from gflow_pl.channels.rules.splitting import SPLITTING_RULES
from gflow_pl.channels.rules.tensor_lists import TENSOR_LIST_RULES
from gflow_pl.channels.rules.views import VIEW_RULES
from gflow_pl.common.errors import SettingsError

__all__ = ["RULES", "RuleError", "register_rule"]

RULES: dict[str, Rule] = {
    **CONVOLUTION_RULES,
    **CREATION_RULES,
    **DIMENSION_RULES,
    **ELEMENTWISE_RULES,
    **INDEXING_RULES,
    **JOINING_RULES,
    **LOSS_RULES,
    **NORM_RULES,
    **PRODUCT_RULES,
    **REARRANGING_RULES,
    **REDUCTION_RULES,
    **SCATTERING_RULES,
    **SPLITTING_RULES,
    **TENSOR_LIST_RULES,
    **VIEW_RULES,
}
"""The rule of every operator by its name, without the namespace for torch's own operators.

`register_rule` adds to it.
"""


class RuleError(SettingsError):
    """A rule that was added with `register_rule` failed or did not label the outputs of its operator."""


@overload
def register_rule(operator: str) -> Callable[[Rule], Rule]: ...


@overload
def register_rule(operator: str, rule: Rule) -> Rule: ...


def register_rule(operator: str, rule: Rule | None = None) -> Rule | Callable[[Rule], Rule]:
    """Add the rule of an operator, so that layers around the operator can be pruned.

    `trace_channels` follows the channels of a network through every operator that a forward pass calls. An operator
    without a rule, such as one that was defined with ``torch.library``, freezes all layers whose channels reach it. The
    rule tells the trace which channels the elements of the operator's outputs belong to. It is a function of one
    `OperatorCall`, which is called after each call of the operator during a trace:

    - ``op.args``, ``op.kwargs`` and ``op.output`` are what the operator got and returned. The tensors may be on the
      meta device: read shapes, not values.
    - ``op.info(x).labels`` holds, for each dimension of an operand ``x``, one label (a whole number that stands for a
      channel) for every position along it. It holds None for a dimension that pruning cannot change.
    - ``op.set_labels(output, labels, zero_dims)`` must be called for each output that is a new tensor. To reorder, pick
      or concatenate channels, index or concatenate the label vectors with numpy.
    - ``op.match(a, b, reason)`` states that two dimensions of operands must keep equal sizes, position by position;
      ``op.freeze(labels, reason)`` states that the operator needs all of these channels; and ``op.mark_inexact(labels,
      reason)`` states that the values of other channels change if some of these are removed.
    - The rule returns nothing.

    The trace checks the shapes that follow from a rule in a forward pass at smaller shapes, and freezes what does not
    fit. It cannot check `zero_dims` and `mark_inexact`.

    Args:
        operator: Name of an existing operator, ``"namespace::name"``.
        rule: The rule. Without it, the function returns a decorator. A later rule replaces an earlier one.

    Returns:
        The rule itself, or the decorator.

    Raises:
        SettingsError: There is no such operator.

    Example:
        >>> import gflow_pl
        >>> from torch import Tensor, nn
        >>> @torch.library.custom_op("gflow_doctest::halve", mutates_args=())
        ... def halve(x: Tensor) -> Tensor:
        ...     return x / 2
        >>> _ = halve.register_fake(torch.empty_like)
        >>> @gflow_pl.register_rule("gflow_doctest::halve")
        ... def halve_rule(op):
        ...     x = op.args[0]
        ...     op.set_labels(op.output, op.info(x).labels, op.info(x).zero_dims)
        >>> class Halved(nn.Sequential):
        ...     def forward(self, x):
        ...         return self[1](halve(self[0](x)))
        >>> print(gflow_pl.trace_channels(Halved(nn.Linear(3, 8), nn.Linear(8, 2)), torch.zeros(1, 3)))
        layer  filters  group  what happens
        0      8        0      removed
        1      2        -      frozen: the model's output
    """
    if rule is None:
        return lambda rule: register_rule(operator, rule)
    namespace, separator, name = operator.partition("::")
    if not separator or not hasattr(getattr(torch.ops, namespace), name):
        raise SettingsError(
            f"register_rule: there is no operator {operator!r}. Give its name as 'namespace::name', and define it "
            "first."
        )
    RULES[operator.removeprefix("aten::")] = _checked(operator, rule)
    return rule


def _checked(operator: str, rule: Rule) -> Rule:
    """Return the rule with checks of what it did, for errors that point at the rule instead of the network."""

    def checked_rule(op: OperatorCall) -> None:
        op.is_guess = True  # the verification makes several trials: a wrong rule may be right by chance in one
        try:
            rule(op)
        except Exception as error:
            raise RuleError(f"The rule of operator '{operator}' failed: {type(error).__name__}: {error}") from error
        for number, output in enumerate(op.outputs):
            info = op.table.known(output)
            if info is None:
                raise RuleError(f"The rule of operator '{operator}' must call set_labels for output {number}.")
            fits = len(info.labels) == output.ndim and all(
                labels is None or len(labels) == size for size, labels in zip(output.shape, info.labels, strict=True)
            )
            if not fits:
                got = ["None" if labels is None else str(len(labels)) for labels in info.labels]
                raise RuleError(
                    f"The rule of operator '{operator}' must set one label for each position of output {number}, "
                    f"which has shape {tuple(output.shape)}; it set [{', '.join(got)}] labels."
                )

    return checked_rule

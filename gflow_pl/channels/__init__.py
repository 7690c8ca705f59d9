"""Find out which channels of a network belong together, and why the others cannot be pruned."""

from gflow_pl.channels.rules.operator_call import OperatorCall
from gflow_pl.channels.rules.registry import register_rule
from gflow_pl.channels.trace import trace_channels

__all__ = ["OperatorCall", "register_rule", "trace_channels"]

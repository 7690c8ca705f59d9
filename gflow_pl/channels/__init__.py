"""Find out which channels of a network belong together, and why the others cannot be pruned."""

from gflow_pl.channels.example_calls import keywords_of
from gflow_pl.channels.forward_runner import Call, Calls, NetworkCopies
from gflow_pl.channels.rules.operator_call import OperatorCall
from gflow_pl.channels.rules.registry import register_rule
from gflow_pl.channels.trace import CallError, trace_channels
from gflow_pl.channels.trace_calls import trace_calls

__all__ = [
    "Call",
    "CallError",
    "Calls",
    "NetworkCopies",
    "OperatorCall",
    "keywords_of",
    "register_rule",
    "trace_calls",
    "trace_channels",
]

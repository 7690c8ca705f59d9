"""`trace_calls`: trace a network through several calls, such as its forward and a training step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from gflow_pl.channels.copied_groups import add_copied_groups
from gflow_pl.channels.forward_runner import Calls, ForwardRunner, NetworkCopies
from gflow_pl.channels.trace import trace_runs
from gflow_pl.common.snapshot import garbage_collection_paused
from gflow_pl.values import ChannelGraph
from gflow_pl.values.choices import Frozen, Residual

__all__ = ["trace_calls"]


def trace_calls(
    model: nn.Module,
    calls: Calls,
    *,
    copies: NetworkCopies | None = None,
    whole: Mapping[str, str] | None = None,
    unread: Mapping[str, str] | None = None,
    residual: Residual = "expand",
    exact_only: bool = False,
    frozen: Frozen = "keep",
    must_run: bool = True,
) -> ChannelGraph:
    """Trace a network like `trace_channels`, but through calls of any functions that run it.

    The calls of a mode are recorded one after the other, and what they show is joined: a unit can be removed if all of
    them allow it.

    Args:
        model: The network.
        calls: For every mode (True = training), functions that run the model, each with its arguments. A layer's cost
            is that of the first call in evaluation mode that runs it.
        copies: Copies of parts of the network. Each unit of the part holds the slices of its copies as well.
        whole: Name of a module to the reason why all of its tensors stay whole.
        unread: Name of a module that no call runs, to the reason why channels stay that have the width of its input.
        residual: See `trace_channels`.
        exact_only: See `trace_channels`.
        frozen: See `trace_channels`.
        must_run: Whether an error of a call is raised; otherwise what ran before the error is frozen.

    Returns:
        The graph. For each group of a part that has copies, there is a group of every copy that follows it.

    Raises:
        CallError: A call raises an error under the trace, and `must_run` is set.
        SettingsError: As in `trace_channels`.
    """
    copies = NetworkCopies() if copies is None else copies
    runner_of = partial(ForwardRunner, model, (), calls=calls, copies=copies, whole=whole or {}, unread=unread or {})
    with garbage_collection_paused():
        graph = trace_runs([runner_of], residual, exact_only, frozen, must_run=must_run)
    # A loss gives the output layers a reason of its own, which says less.
    outputs = [name for name in graph.frozen if graph.layers[name].is_output]
    graph.frozen.update(dict.fromkeys(outputs, "the model's output"))
    return add_copied_groups(graph, copies.modules)

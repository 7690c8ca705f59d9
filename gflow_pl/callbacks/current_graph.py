"""The graph of a module as it is now: traced before training, and again where the module has changed since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gflow_pl.callbacks.lightning.module_forward import training_of
from gflow_pl.callbacks.lightning.network_copies import CopyWatch
from gflow_pl.callbacks.lightning.ranks import computed_on_rank_zero
from gflow_pl.common.lightning_package import pl
from gflow_pl.values import ChannelGraph

__all__ = ["current_graph"]


def current_graph(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    known: ChannelGraph | None,
    watch: CopyWatch,
    trace: Callable[[], ChannelGraph],
) -> ChannelGraph:
    """Return the graph of a module; the known one where it still describes the module. Rank 0 traces for all ranks.

    Args:
        trainer: The Trainer.
        module: The module.
        known: The graph so far; None before the first trace.
        watch: Finds the copies of parts of the module.
        trace: Traces the module.
    """
    watch.find(module, training_of(module))  # on every rank, whose copies are its own

    def traced() -> dict[str, Any] | None:
        if known is not None and describes(known, module) and _has_same_copies(known, watch):
            return None
        return _carried_over(trace(), known).as_dict()

    plain = computed_on_rank_zero(trainer, traced)
    if plain is None:
        assert known is not None
        return known
    return ChannelGraph.from_dict(plain)


def describes(graph: ChannelGraph, module: nn.Module) -> bool:
    """Return whether a module has the parameters of a graph, and every tensor that the graph cuts in its shape.

    Other tools replace tensors while a network is trained: masks and parametrizations keep a weight under a new name.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    parameters = {name for name in graph.shapes if name not in graph.buffers}
    cut = {part.tensor for group in graph.groups for part in group.slices}
    return parameters == {name for name, _ in module.named_parameters()} and all(
        shapes.get(name) == graph.shapes[name] for name in cut
    )


def _has_same_copies(graph: ChannelGraph, watch: CopyWatch) -> bool:
    """Return whether all copies that are known by now were known when the graph was traced."""
    followers = {part.layer for group in graph.groups if group.follows is not None for part in group.layers}
    leaders = {part.layer for group in graph.leaders for part in group.layers}
    copied = {
        path + layer[len(source) :]
        for path, source in watch.known.items()
        for layer in leaders
        if layer == source or layer.startswith(f"{source}.")
    }
    return {name for name in copied if f"{name}.weight" in graph.shapes} <= followers


def _carried_over(graph: ChannelGraph, before: ChannelGraph | None) -> ChannelGraph:
    """Give the groups of a new graph the numbers of their units in the graph before, where these still fit."""
    if before is not None:
        known = {group.name: group for group in before.groups}
        graph.groups = [
            group.with_parts(original_size=known[group.name].original_size, kept=known[group.name].kept)
            if group.name in known and known[group.name].size == group.size
            else group
            for group in graph.groups
        ]
    return graph

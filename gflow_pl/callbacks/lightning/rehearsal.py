"""Run a training step that cannot be traced on smaller networks, to find the layers that it needs whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gflow_pl.callbacks.lightning.silence import SideEffects
from gflow_pl.callbacks.lightning.step_trial import Trial, try_call
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import pl
from gflow_pl.common.snapshot import module_snapshots
from gflow_pl.common.tensor_values import StoredValues
from gflow_pl.surgery import rewrite
from gflow_pl.values import ChannelGraph, ChannelGroup

__all__ = ["without_needed_groups"]

_REASON = "`training_step` cannot be followed ({why}), and it fails if this layer is smaller"


def without_needed_groups(
    module: pl.LightningModule,
    graph: ChannelGraph,
    step: Callable[[Any], Any],
    batch: object,
    trial: Trial,
    effects: SideEffects,
) -> ChannelGraph:
    """Return a graph without the groups whose units a training step needs.

    The step is run on the network without half of the units of all groups. Where it fails, the groups are halved until
    the ones are found that alone let it fail. The module is restored every time.

    Args:
        module: The module.
        graph: The graph of its forward.
        step: The step, a function of a batch.
        batch: A batch.
        trial: How the step has run on the whole network, with the reason why it cannot be followed.
        effects: The side effects on the module.

    Raises:
        SettingsError: The step fails although no group alone lets it fail.
    """
    why = f"{type(trial.error).__name__}: {trial.error}".partition("\n")[0][:160]
    whole = try_call(module, step, (batch,), effects, training=True)
    if whole.error is not None:
        pl.utilities.rank_zero_warn(
            f"PruningCallback: `training_step` of {type(module).__name__} could not be tried out before training "
            f"({why}), so only `forward` has been followed: a layer that the step alone reads keeps its width, and the "
            "step fails after a cut of what it reads. Name such layers in `ignore`."
        )
        return graph

    def error_without(groups: list[ChannelGroup]) -> Exception | None:
        return _error_of_smaller(module, graph, step, batch, groups, effects)

    needed = {group.name for group in _failing(graph.leaders, error_without)}
    rest = [group for group in graph.leaders if group.name not in needed]
    error = error_without(rest) if needed and rest else None
    if error is not None:
        raise SettingsError(
            f"PruningCallback: `training_step` of {type(module).__name__} cannot be followed ({why}), and it fails if "
            f"the layers {', '.join(group.name for group in rest)} are smaller ({type(error).__name__}: {error}): name "
            "the layers that the step needs whole in `ignore`."
        ) from error
    return _without(graph, needed, _REASON.format(why=why))


def _failing(
    groups: list[ChannelGroup], error_without: Callable[[list[ChannelGroup]], Exception | None]
) -> list[ChannelGroup]:
    """Return the groups that alone let the step fail."""
    if not groups or error_without(groups) is None:
        return []
    if len(groups) == 1:
        return groups
    half = len(groups) // 2
    return [*_failing(groups[:half], error_without), *_failing(groups[half:], error_without)]


def _error_of_smaller(
    module: pl.LightningModule,
    graph: ChannelGraph,
    step: Callable[[Any], Any],
    batch: object,
    groups: list[ChannelGroup],
    effects: SideEffects,
) -> Exception | None:
    """Return the error of the step on the module without half of the units of some groups; None if there is none."""
    snapshots, gradients = module_snapshots(module), [(p, p.grad) for p in module.parameters()]
    values = StoredValues([*module.parameters(), *module.buffers()])
    plan = {group.name: torch.arange(group.size) >= group.size // 2 for group in groups}
    try:
        rewrite(module, graph.copy(), plan)
        # What a step changes in the smaller module is undone together with the rewrite.
        return try_call(module, step, (batch,), None, training=True).error
    finally:
        for snapshot in snapshots:
            snapshot.restore()
        values.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        effects.undo()


def _without(graph: ChannelGraph, names: set[str], reason: str) -> ChannelGraph:
    """Return the graph without some groups, whose layers are frozen."""
    for group in graph.groups:
        if group.name in names or group.follows in names:
            graph.frozen.update({part.layer: reason for part in group.layers})
    graph.groups = [g for g in graph.groups if g.name not in names and g.follows not in names]
    graph.patches = {
        attribute: replace(rule, per_unit={g: n for g, n in rule.per_unit.items() if g not in names})
        for attribute, rule in graph.patches.items()
    }
    return graph

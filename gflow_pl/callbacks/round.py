"""One round of pruning: score the filters, choose the units that stay, rewrite the network, measure what changed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gflow_pl.callbacks.lightning.module_forward import is_compiled, trace_module
from gflow_pl.callbacks.lightning.network_copies import CopyWatch
from gflow_pl.callbacks.lightning.packages import averaged_models, callbacks_of
from gflow_pl.callbacks.lightning.ranks import broadcast, broadcast_buffers, rebuild_ddp
from gflow_pl.callbacks.lightning.rng import isolated_rng
from gflow_pl.callbacks.lightning.silence import SideEffects, without_side_effects
from gflow_pl.callbacks.pruning_settings import RoundSettings, SelectionSettings, TraceSettings
from gflow_pl.callbacks.round_row import RoundRow, count_removed
from gflow_pl.callbacks.scoring import LossAndNorm
from gflow_pl.callbacks.tracked_scoring import RoundInputs, TrackedScoring
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.common.lightning_package import pl
from gflow_pl.importance.gradients import LossFn
from gflow_pl.selection import PruningSchedule, cost_after, select_units
from gflow_pl.selection.floors import match_groups
from gflow_pl.surgery import drop_state, rewrite
from gflow_pl.values import ChannelGraph, ChannelGroup, KeepPlan, Scores
from gflow_pl.values.choices import Target

__all__ = ["Costs", "Round", "costs_of", "select_by_schedule", "trace_prunable"]

Costs = dict[Target, int]
"""Filters, parameters and multiply-accumulates of a network, by the names that `target` may have."""


def costs_of(graph: ChannelGraph) -> Costs:
    """Return the costs of the network in its present shape."""
    parameters, macs = cost_after(graph)
    return {"filters": graph.num_filters, "parameters": parameters, "macs": macs}


def select_by_schedule(
    graph: ChannelGraph,
    scores: Scores,
    schedule: PruningSchedule,
    number: int,
    original_costs: Costs,
    settings: SelectionSettings,
) -> KeepPlan:
    """Return the units that stay in a round, so that the schedule's share of the target is gone after it.

    Args:
        graph: The traced network in its present shape.
        scores: Scores of all filters; higher = keep.
        schedule: Shares to cut in all rounds.
        number: Number of the round, from 1.
        original_costs: Costs of the network before the first round.
        settings: The target, and which units may be cut.
    """
    fraction, num_filters = None, None
    if settings.target == "filters":
        num_filters = schedule.target(number, original_costs["filters"], graph.num_filters)
    else:
        fraction = schedule.share(number, original_costs[settings.target], costs_of(graph)[settings.target])
    return select_units(
        graph,
        scores,
        fraction,
        min_kept=settings.min_kept,
        ignore=[*settings.ignore, *(_stem_groups(graph) if settings.protect_stem else [])],
        num_filters=num_filters,
        target=settings.target,
        scope=settings.scope,
        unit_score=settings.unit_score,
    )


def _stem_groups(graph: ChannelGraph) -> list[str]:
    """Return the expanded groups whose layer reads the network's input, where a residual stream begins.

    The paper protects them.
    """
    return [
        group.name
        for group in graph.groups
        if group.kind == "expand" and any(graph.layers[part.layer].reads_input for part in group.layers)
    ]


def trace_prunable(
    module: pl.LightningModule,
    batch: object,
    loss_fn: LossFn,
    settings: TraceSettings,
    ignore: list[str],
    watch: CopyWatch,
) -> ChannelGraph:
    """Trace a module, and raise if it cannot be pruned.

    Args:
        module: The module, with its Trainer.
        batch: A training batch on the module's device.
        loss_fn: Loss of a batch, for modules whose `forward` takes no batch.
        settings: How to trace.
        ignore: The names in the setting `ignore`, which must exist.
        watch: Finds the copies of parts of the module.

    Returns:
        A graph with at least one group.

    Raises:
        SettingsError: No layer can be pruned, or a name in `ignore` matches nothing.
    """
    with without_side_effects(module) as effects:
        graph = trace_module(
            module,
            batch,
            loss_fn,
            effects,
            watch,
            residual=settings.residual,
            exact_only=settings.exact_only,
        )
    if not graph.groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(graph.frozen.items())[:3])
        raise SettingsError(f"PruningCallback: no layer of {type(module).__name__} can be pruned: {reasons}")
    match_groups(graph.groups, graph.layers, ignore)
    return graph


@dataclass(frozen=True)
class Round:
    """One round of pruning.

    Args:
        inputs: Inputs of the scores. The rewrite updates the graph and the initial state in place.
        tracked: Scores that were tracked in training; None to score by passes over calibration batches.
        select: ``select(graph, scores)`` returns the plan of the units that stay.
        schedule: Shares to cut in all rounds.
        target: Quantity that these are shares of.
        original_costs: Costs of the network before the first round.
        settings: Further settings, such as whether to keep the optimizers' state.
        watch: Finds the copies of parts of the module, which are cut along.
    """

    inputs: RoundInputs
    tracked: TrackedScoring | None
    select: Callable[[ChannelGraph, Scores], KeepPlan]
    schedule: PruningSchedule
    target: Target
    original_costs: Costs
    settings: RoundSettings
    watch: CopyWatch

    def run(self, trainer: pl.Trainer, module: pl.LightningModule) -> RoundRow:
        """Prune the module, and return the row of the round.

        The module runs in evaluation mode, its side effects are undone, and random generators are restored. All ranks
        call this at the same time, and cut by the plan of rank 0.
        """
        start, inputs, scoring = time.perf_counter(), self.inputs, self.inputs.scoring
        with isolated_rng(scoring.settings.seed, inputs.rounds_done, trainer.global_rank), torch.inference_mode(False):
            # Make the batches before the module is in evaluation mode: they are augmented as in training.
            batches = scoring.calibration_batches(trainer, module, inputs.rounds_done)
            first = next(iter(batches))
            if self.settings.unpruned_path is not None and inputs.rounds_done == 0:
                trainer.save_checkpoint(os.fspath(self.settings.unpruned_path), weights_only=True)
            broadcast_buffers(trainer, module)

            # Score the filters.
            scores = None if self.tracked is None else self.tracked.scores(trainer, module, first, inputs)
            with _measuring(module) as effects:
                before = scoring.loss_and_gradient_norm(trainer, module, first, inputs.rounds_done)
                if scores is None:
                    effects.undo()
                    scores = scoring.scores(
                        trainer, module, batches, first, inputs.graph, inputs.initial_state, inputs.rounds_done, effects
                    )

            # Cut.
            plan = KeepPlan.from_dict(broadcast(trainer, self.select(inputs.graph, scores).as_dict()))
            groups, costs = list(inputs.graph.groups), costs_of(inputs.graph)
            self._rewrite(trainer, module, plan)

            # Measure the smaller network.
            accuracy = None
            with _measuring(module) as effects:
                after = scoring.loss_and_gradient_norm(trainer, module, first, inputs.rounds_done)
                if self.settings.evaluate_cuts:
                    effects.undo()
                    accuracy = scoring.accuracy(trainer, module, effects)
        return self._row(trainer.current_epoch, module, groups, costs, before, after, accuracy, start)

    def _rewrite(self, trainer: pl.Trainer, module: pl.LightningModule, plan: KeepPlan) -> None:
        """Rewrite the module, its optimizers, and every other tensor of the Trainer that has a parameter's shape."""
        optimizers = list(trainer.strategy.optimizers)
        if not self.settings.keep_momentum:
            drop_state(optimizers)
        # Other callbacks declare their tensors by this method.
        declared = [
            c.tensors_by_name() for c in callbacks_of(trainer, pl.callbacks.Callback) if hasattr(c, "tensors_by_name")
        ]
        initial = [] if self.inputs.initial_state is None else [self.inputs.initial_state]
        copies = [*averaged_models(trainer), *initial, *declared, *self.watch.find(module).for_rewrite(module)]
        rewrite(module, self.inputs.graph, plan, optimizers=optimizers, copies=copies)
        if is_compiled(module):
            # One recompilation for each round would soon reach dynamo's limit, and then it silently stops compiling.
            torch._dynamo.reset()
        rebuild_ddp(trainer, module)

    def _row(
        self,
        epoch: int,
        module: pl.LightningModule,
        groups: list[ChannelGroup],
        costs: Costs,
        before: LossAndNorm,
        after: LossAndNorm,
        accuracy: float | None,
        start: float,
    ) -> RoundRow:
        """Return the row of the round.

        Args:
            epoch: The current epoch.
            module: The rewritten module.
            groups: The groups before the cut.
            costs: The costs before the cut.
            before: Loss and gradient norm before the cut.
            after: Loss and gradient norm after the cut.
            accuracy: Validation accuracy after the cut; None if it was not measured.
            start: Time when the round began, in seconds.
        """
        # Costs before, asked for, and after the cut.
        k, graph, target, original = self.inputs.rounds_done + 1, self.inputs.graph, self.target, self.original_costs
        costs_after = costs_of(graph)
        filters_asked = self.schedule.target(k, original["filters"], costs["filters"])
        removed = count_removed([group for group in groups if group.follows is None], graph.leaders)
        return RoundRow(
            round=k,
            epoch=epoch,
            measure=self.inputs.scoring.settings.measure.name,
            fraction_asked=1 - self.schedule.kept_after(k),
            fraction_reached=1 - costs_after[target] / original[target],
            filters_asked=filters_asked if target == "filters" else "",
            filters_removed=costs["filters"] - costs_after["filters"],
            filters_left=costs_after["filters"],
            share_asked=self.schedule.share(k, original[target], costs[target]),
            share_reached=1 - costs_after[target] / costs[target],
            parameters=sum(p.numel() for p in module.parameters()),
            macs=costs_after["macs"],
            loss_before=before.loss,
            loss_after=after.loss,
            gradient_norm_before=before.gradient_norm,
            gradient_norm_after=after.gradient_norm,
            accuracy_after_cut="" if accuracy is None else accuracy,
            units_removed=removed.num_units,
            removed_by_layer=json.dumps(removed.filters_by_layer),
            units_removed_by_layer=json.dumps(removed.units_by_layer),
            seconds=round(time.perf_counter() - start, 3),
        )


@contextmanager
def _measuring(module: pl.LightningModule) -> Iterator[SideEffects]:
    """Put a module into evaluation mode, and undo the side effects of running it at the end of the block."""
    with evaluation_mode(module), without_side_effects(module) as effects:
        yield effects

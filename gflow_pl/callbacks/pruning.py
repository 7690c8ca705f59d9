"""PruningCallback: prunes the network of any LightningModule while it trains."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch.optim import Optimizer
from typing_extensions import override

from gflow_pl.callbacks.current_graph import current_graph
from gflow_pl.callbacks.lightning.best_checkpoints import BestAfterCuts
from gflow_pl.callbacks.lightning.held_lr import HeldLearningRate
from gflow_pl.callbacks.lightning.network_copies import CopyWatch
from gflow_pl.callbacks.lightning.packages import callbacks_of
from gflow_pl.callbacks.lightning.rng import isolated_rng
from gflow_pl.callbacks.lightning.training_loss import training_step_returns_loss
from gflow_pl.callbacks.lightning.unsupported import check_supported
from gflow_pl.callbacks.pruning_settings import (
    CutTimes,
    RoundSettings,
    ScoringSettings,
    SelectionSettings,
    TraceSettings,
    TrackingSettings,
)
from gflow_pl.callbacks.pruning_state import PruningState
from gflow_pl.callbacks.round import Round, costs_of, select_by_schedule, trace_prunable
from gflow_pl.callbacks.round_row import RoundRow, RowsFile
from gflow_pl.callbacks.scoring import Scoring
from gflow_pl.callbacks.tracked_scoring import RoundInputs, report_tracking
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import pl
from gflow_pl.importance import Importance, resolve_measure
from gflow_pl.importance.gradients import LogitsFn, LossFn
from gflow_pl.selection import PruningSchedule
from gflow_pl.surgery import check_optimizers
from gflow_pl.values import ChannelGraph, KeepPlan, Scores
from gflow_pl.values.choices import Bias, Residual, Scope, Target, TrackOrder, UnitScore

__all__ = ["PruningCallback", "find_pruning_callback"]


class PruningCallback(PruningState):
    """Prune the filters of a LightningModule in rounds while it trains.

    At the start of a training epoch in which a round is due, filters are scored on batches of the training data. The
    filters with the lowest scores are removed: layers, optimizers and everything else of their shape are rewritten in
    place. Every checkpoint carries the network's shape. Override `should_prune` or `select` to change when and what to
    prune.

    Args:
        measure: Importance measure, by name (docs/measures.md) or as an `Importance`.
        fraction: Share of the filters to remove in all rounds together, in (0, 1). None: 0.75, unless `thresholds` is
            set.
        rounds: Number of rounds, at least 1. None: 1, unless `thresholds` is set. The first round removes the largest
            share (published schedule).
        thresholds: Share of the filters that is gone after each round, ascending, for example [0.1, 0.5, 0.8]. Replaces
            `fraction` and `rounds`.
        target: Quantity that the fraction is a share of: "filters", "parameters", or "macs" (multiply-accumulates).
        warmup_epochs: Epochs of training before the epoch that leads to the first cut. Round k is cut at the start of
            epoch ``warmup_epochs + k * every_n_epochs``, counted from 0.
        every_n_epochs: Epochs of training before each cut.
        epochs: Epochs at whose start the rounds are cut, one for each round. Replaces `warmup_epochs` and
            `every_n_epochs`; 0 is before the first step, for a network that is trained already.
        num_samples: Number of images to score on, over all ranks. Whole batches are taken until it is reached.
        batches: Number of batches to score on, in place of `num_samples`. Required for data without a length.
        residual: "expand": layers that write into a residual stream lose filters one by one, and the stream keeps its
            width (as in the paper). "remove": the coupled stream shrinks.
        exact_only: Whether to leave alone what cannot be removed without changing the rest of the network.
        min_kept: Share of its original filters that every group keeps at least, in [0, 1].
        scope: "global" ranks all filters together; "layer" ranks each group for itself.
        unit_score: Reduction from the scores of the layers that share a unit to the score of the unit: "mean", "sum" or
            "max".
        ignore: Layers and groups that stay whole, by name or by a prefix that ends before a dot ("network.layers.0").
        protect_stem: Whether an expanded layer that reads the images stays whole (the first conv of a ResNet, as in the
            paper).
        temperature: Divisor of the logits while scoring, > 0. None: the measure's own (grasp 200, grad_preserve 1),
            else the module's own loss as it is.
        bias: Factor on each weight's summand of a gradient measure: "none", "magnitude" or "distance_from_init".
        keep_momentum: Whether to prune the optimizers' state along (True) or to drop it as in the paper (False). None:
            False, but True for biased_loss_tracked.
        track: Whether to score by the gradients of training itself, averaged exponentially over the last steps of the
            epoch before the cut, without extra passes. None: False, but True for biased_loss_tracked.
        track_batches: Number of steps at the end of each epoch to track, at least 1.
        alpha: Share of the newest step in the average, in (0, 1]. None: the measure's own (0.8).
        track_order: "formula": gradient and weights of the same step. "published": the weights after the step.
        prune_lr: Learning rate to hold during warm-up and rounds, > 0. The module's own schedule continues unaffected.
        published_truncation: Whether to repeat the published code's truncation of the percentage kept.
        loss_fn: ``loss_fn(module, batch)`` returns the scalar loss that gradients are taken of, in place of the
            module's `training_step`. Required under manual optimization, unless the measure reads no data.
        logits_fn: ``logits_fn(module, batch)`` returns (logits, labels), for a measure with a temperature of its own.
        reset_best: Whether monitored ModelCheckpoints and EarlyStopping start anew at each round, so that "best" never
            refers to the network before the cut.
        evaluate_cuts: Whether to measure the validation accuracy right after each cut (classifiers only).
        unpruned_path: File in which to save the network as it is just before the first cut.
        rows_path: CSV file with a row for every round, rewritten after each. None: pruning.csv in the Trainer's log_dir
            (its default_root_dir if no logger has a folder), or pruning-v1.csv and so on beside the files of other
            runs. A resumed run keeps the name that it had.
        seed: Seed of the batches to score on, and of the measure `random`.

    Attributes:
        rows: One row for every round done, by column (see `RoundRow`).
        graph: The traced network; None before training.
        schedule: Shares to cut in all rounds.
        times: Epochs of all rounds.

    Raises:
        SettingsError: An argument is out of range, or arguments contradict each other.

    Example:
        >>> callback = PruningCallback("magnitude", fraction=0.75, rounds=5, warmup_epochs=2)
        >>> callback.cut_epochs
        (3, 4, 5, 6, 7)
    """

    def __init__(
        self,
        measure: Importance | str = "magnitude",
        fraction: float | None = None,
        rounds: int | None = None,
        thresholds: list[float] | None = None,
        target: Target = "filters",
        warmup_epochs: int = 0,
        every_n_epochs: int = 1,
        epochs: list[int] | None = None,
        num_samples: int = 2560,
        batches: int | None = None,
        residual: Residual = "expand",
        exact_only: bool = False,
        min_kept: float = 0.05,
        scope: Scope = "global",
        unit_score: UnitScore = "mean",
        ignore: list[str] | None = None,
        protect_stem: bool = True,
        temperature: float | None = None,
        bias: Bias | None = None,
        keep_momentum: bool | None = None,
        track: bool | None = None,
        track_batches: int = 20,
        alpha: float | None = None,
        track_order: TrackOrder = "formula",
        prune_lr: float | None = None,
        published_truncation: bool = False,
        loss_fn: LossFn | None = None,
        logits_fn: LogitsFn | None = None,
        reset_best: bool = True,
        evaluate_cuts: bool = True,
        unpruned_path: str | None = None,
        rows_path: str | None = None,
        seed: int = 0,
    ) -> None:
        # Defaults that depend on the measure.
        measure = resolve_measure(measure)
        if measure.is_tracked and bias is None:
            bias = measure.default_bias
        if measure.is_tracked and alpha is not None:
            measure = copy.copy(measure)  # the caller's object does not change
            measure.alpha = alpha
        alpha = measure.alpha if alpha is None else alpha
        track = measure.is_tracked if track is None else track
        keep_momentum = measure.is_tracked if keep_momentum is None else keep_momentum
        if thresholds is None:
            fraction = 0.75 if fraction is None else fraction
            rounds = 1 if rounds is None else rounds

        # Settings, whose constructors check them.
        schedule = PruningSchedule(fraction, rounds, thresholds, published_truncation)
        super().__init__(schedule, CutTimes(schedule.num_rounds, warmup_epochs, every_n_epochs, epochs))
        self.scoring_settings = ScoringSettings(
            measure, num_samples, batches, temperature, bias, loss_fn, logits_fn, seed
        )
        self.tracking_settings = TrackingSettings(track, track_batches, alpha, track_order)
        self.trace_settings = TraceSettings(residual, exact_only)
        ignore = [] if ignore is None else ignore
        self.selection_settings = SelectionSettings(target, min_kept, scope, unit_score, ignore, protect_stem)
        self.round_settings = RoundSettings(
            keep_momentum, prune_lr, reset_best, evaluate_cuts, unpruned_path, rows_path
        )

        self._held_lr: HeldLearningRate | None = None
        self._best_after_cuts = BestAfterCuts()

    # Methods to override

    def should_prune(self, epoch: int) -> bool:
        """Return whether to cut the next round at the start of this epoch.

        Called once for each epoch until all rounds are done.
        """
        return not self.finished and epoch >= self.cut_epochs[self.rounds_done]

    def select(self, graph: ChannelGraph, scores: Scores) -> KeepPlan:
        """Return the units that stay in the next round.

        Args:
            graph: The traced network in its present shape.
            scores: Scores of all filters; higher = keep.
        """
        number = self.rounds_done + 1
        return select_by_schedule(graph, scores, self.schedule, number, self._original_costs, self.selection_settings)

    # Hooks of the Trainer

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise for an unsupported Trainer, module or path; make the module's checkpoints carry its shape."""
        if stage == "fit":
            check_supported(trainer, self, PruningCallback)
            if not self.rows:
                self._rows_file = RowsFile()
            self._rows_file.check_path(trainer, self.rows_path)
            if self.measure.needs_batches and self.loss_fn is None and not training_step_returns_loss(pl_module):
                raise SettingsError(
                    f"PruningCallback: {type(pl_module).__name__} uses manual optimization or fetches its batches "
                    "itself, so its `training_step` does not return the loss of a batch: set `loss_fn(module, "
                    "batch)`, which returns the scalar loss to score by."
                )
            self._scoring = Scoring(self.scoring_settings)
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the schedule, copy the initial weights if a measure needs them, restore random states."""
        super().on_fit_start(trainer, pl_module)
        # Checks.
        self._check_same_network(pl_module)
        optimizers = trainer.strategy.optimizers
        self._watch = CopyWatch(pl_module, self.ignore)
        if not self.finished:
            overrides_should_prune = getattr(self.should_prune, "__func__", None) is not PruningCallback.should_prune
            if not getattr(trainer, "fast_dev_run", False) and not overrides_should_prune:
                self.times.check_fits(trainer.max_epochs)
            check_optimizers(optimizers, keep_state=self.keep_momentum, remedy="set keep_momentum to false")
        # Initial weights.
        if self.bias == "distance_from_init" and self._initial_state is None:
            self._initial_state = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        if self._initial_state is not None:
            self._initial_state = {name: tensor.to(pl_module.device) for name, tensor in self._initial_state.items()}
        # Learning rate and random states.
        if self.prune_lr is not None:
            self._held_lr = HeldLearningRate(self.prune_lr, optimizers, lambda: not self.finished)
        self._restore_rng(trainer)
        report_tracking(self.scoring_settings, self.tracking_settings, self.keep_momentum)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Trace the network before its first epoch; cut the next round if it is due."""
        if is_new := self.graph is None:
            self._update_graph(trainer, pl_module)
        if not self.finished and self.should_prune(trainer.current_epoch):
            if not is_new:
                self._update_graph(trainer, pl_module)
            assert self.graph is not None
            next_round = Round(
                self._inputs(self.graph),
                self._tracked if self.tracking_settings.track else None,
                self.select,
                self.schedule,
                self.selection_settings.target,
                self._original_costs,
                self.round_settings,
                self._watch,
            )
            row = next_round.run(trainer, pl_module)
            self.rows.append(row.as_dict())
            self._report(trainer, row)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Begin to track the step of a batch, if scores are tracked."""
        self._tracked.end_batch()  # of a batch that was skipped
        if self.tracking_settings.track and not self.finished:
            assert self.graph is not None
            self._tracked.begin_batch(trainer, pl_module, batch, batch_idx, self._inputs(self.graph))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Track this step's gradients: of the global batch, unscaled, before clipping."""
        self._tracked.before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """In the order "published", track the weights after the step."""
        self._tracked.after_optimizer_step(pl_module)
        self._tracked.end_batch()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn about rounds that did not take place, and forget best checkpoints from before the last cut."""
        self._best_after_cuts.forget_outdated_files(trainer)
        if not self.finished and not getattr(trainer, "fast_dev_run", False) and not trainer.interrupted:
            pl.utilities.rank_zero_warn(
                f"PruningCallback: training ended in epoch {trainer.current_epoch} after {self.rounds_done} of "
                f"{self.schedule.num_rounds} rounds; the others were due at epochs "
                f"{list(self.cut_epochs[self.rounds_done :])}."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hooks on the optimizers and on the module."""
        super().teardown(trainer, pl_module, stage)
        self._remove_hooks()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the hooks on the optimizers, so that a checkpoint saved now has their own learning rates."""
        super().on_exception(trainer, pl_module, exception)
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        self._tracked.end_batch()
        if self._held_lr is not None:
            self._held_lr.remove()
            self._held_lr = None

    def _update_graph(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Trace the module, unless the graph still describes it."""
        with isolated_rng(self.seed, 0, trainer.global_rank), torch.inference_mode(False):
            batch = next(iter(self._scoring.calibration_batches(trainer, module, self.rounds_done)))
            settings = (self._scoring.loss_fn, self.trace_settings, self.ignore, self._watch)
            trace = partial(trace_prunable, module, batch, *settings)
            self.graph = current_graph(trainer, module, self.graph, self._watch, trace)
        if not self._original_costs:
            self._original_costs = costs_of(self.graph)

    def _inputs(self, graph: ChannelGraph) -> RoundInputs:
        return RoundInputs(self._scoring, self.tracking_settings, graph, self._initial_state, self.rounds_done)

    def _report(self, trainer: pl.Trainer, row: RoundRow) -> None:
        """Log a round, write its row, and reset what other callbacks remember as best."""
        settings = self.round_settings
        pl.utilities.rank_zero_info(row.line(self.schedule.num_rounds, self.selection_settings.target))
        self._rows_file.write(trainer, self.rows, settings.rows_path)
        for logger in trainer.loggers:
            logger.log_metrics(row.numbers(), step=trainer.global_step)
        if settings.reset_best:
            self._best_after_cuts.reset(trainer)


def find_pruning_callback(trainer: pl.Trainer) -> PruningCallback | None:
    """Return the `PruningCallback` of a Trainer, or the instance of a subclass; None if there is none."""
    return next(iter(callbacks_of(trainer, PruningCallback)), None)

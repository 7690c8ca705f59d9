"""PruningCallback: makes the network of any LightningModule physically smaller while it trains."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from gflow_pl.callbacks.lightning.best_checkpoints import last_saved_steps, reset_best_scores
from gflow_pl.callbacks.lightning.carries_structure import CarriesStructure
from gflow_pl.callbacks.lightning.held_lr import HeldLearningRate
from gflow_pl.callbacks.lightning.module_forward import trace_module
from gflow_pl.callbacks.lightning.ranks import (
    all_gather_objects,
    broadcast,
    broadcast_buffers,
    mean_over_ranks,
    num_ranks,
)
from gflow_pl.callbacks.lightning.rng import capture_rng_state, isolated_rng
from gflow_pl.callbacks.lightning.silence import without_side_effects
from gflow_pl.callbacks.lightning.training_loss import training_loss, training_step_returns_loss
from gflow_pl.callbacks.lightning.unsupported import check_supported
from gflow_pl.callbacks.pruning_settings import CutTimes, check_arguments
from gflow_pl.callbacks.resuming import check_same_schedule, restore_rng_of_ranks
from gflow_pl.callbacks.round import apply_plan, costs_of, stem_groups
from gflow_pl.callbacks.round_row import RowsFile, Stopwatch, gone, line_of, numbers_of
from gflow_pl.callbacks.scoring import Scoring
from gflow_pl.callbacks.tracked_scoring import Tracking
from gflow_pl.importance import Importance, Tracker, resolve_measure
from gflow_pl.selection import PruningSchedule, select_units
from gflow_pl.selection.floors import match_groups
from gflow_pl.surgery import check_optimizers
from gflow_pl.values import ChannelGraph, KeepPlan, Scores

__all__ = ["PruningCallback"]


class PruningCallback(CarriesStructure):
    """Prunes the filters of a LightningModule in rounds while it trains.

    At the start of a training epoch in which a round is due, filters are scored on batches of the training data, the
    lowest go, and the layers, the optimizers and everything else of their shape are rewritten in place. Every checkpoint
    carries the network's shape. Override `should_prune` or `select` to decide otherwise.

    Args:
        measure: Importance measure by name (or an `Importance`): magnitude, loss, biased_loss, biased_loss_tracked,
            grasp, grad_preserve, tfo, fisher, nvidia, l1, bn, random.
        fraction: Share of the filters that is gone after the last round, in (0, 1); None: 0.75, unless `thresholds` say.
        rounds: Rounds in which that happens, at least 1; None: 1, unless `thresholds` say. The first takes the largest share
            (published schedule).
        thresholds: Share of the filters gone after each round, ascending, for example [0.1, 0.5, 0.8]; in place of
            `fraction` and `rounds`.
        target: What the fraction is a share of: "filters", "parameters", or "macs" (multiply-accumulates).
        warmup_epochs: Epochs of training before the first round's own epoch; round k is cut at the start of epoch
            ``warmup_epochs + k * every_n_epochs``, counted from 0.
        every_n_epochs: Epochs of training before each cut.
        epochs: The epochs at whose start the rounds are cut, one a round, in place of the two above; 0 is before the
            first step, for a network that is trained already.
        num_samples: Images that scores are taken from, over all ranks: whole batches until reached.
        batches: Batches that scores are taken from, in place of `num_samples`; data without a length needs it.
        residual: "expand": what writes into a residual stream loses filters by itself and the stream keeps its width
            (the paper); "remove": the coupled stream shrinks.
        exact_only: Whether to leave alone what cannot be removed without changing the rest of the network.
        min_kept: Share of its original filters that every group keeps at least, in [0, 1].
        scope: "global" ranks all filters together; "layer" each group by itself.
        unit_score: How the scores of layers that share a unit become one: "mean", "sum" or "max".
        ignore: Layers and groups that stay whole, by name or by what stands before a dot ("network.layers.0").
        protect_stem: Whether an expanded layer that reads the images stays whole (a ResNet's first conv in the paper).
        temperature: Divides the logits while scoring, > 0; None: the measure's own (grasp 200, grad_preserve 1), else the
            module's own loss as it is.
        bias: Multiplies each weight's summand of a gradient measure: "none", "magnitude" or "distance_from_init".
        keep_momentum: Whether the optimizers' state is pruned along (True) or dropped as in the paper (False). None:
            False, but True for biased_loss_tracked.
        track: Whether scores come from the training's own gradients, averaged exponentially over the last steps of the
            epoch before the cut, at no extra pass. None: False, but True for biased_loss_tracked.
        track_batches: Steps at the end of each epoch that are tracked, at least 1.
        alpha: Share of the newest step in the average, in (0, 1]; None: the measure's own (0.8).
        track_order: "formula": gradient and weights of the same step; "published": the weights after the step.
        prune_lr: Learning rate to hold during warm-up and rounds, > 0; the module's own schedule goes on unseen.
        published_truncation: Repeat the published code's truncation of the percentage kept.
        loss_fn: ``loss_fn(module, batch)`` gives the scalar loss that gradients are taken of, in place of the module's
            `training_step`; manual optimization needs it.
        logits_fn: ``logits_fn(module, batch)`` gives (logits, labels), for a measure with a temperature of its own.
        reset_best: Whether monitored ModelCheckpoints and EarlyStopping start anew at each round, so that "best" is never
            another network.
        evaluate_cuts: Whether to measure the validation accuracy right after each cut (classifiers only).
        unpruned_path: File in which to keep the network as it is just before the first cut.
        rows_path: CSV file that has a row for every round, written anew after each; None: pruning.csv in the Trainer's
            log_dir (its default_root_dir where no logger has a folder), or pruning-v1.csv and so on beside the files of other
            runs; a run that is resumed goes on with the name that it had.
        seed: Seed of the batches that scores are taken from, and of the measure `random`.

    Raises:
        ValueError: An argument is out of range, or they contradict each other.

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
        target: Literal["filters", "parameters", "macs"] = "filters",
        warmup_epochs: int = 0,
        every_n_epochs: int = 1,
        epochs: list[int] | None = None,
        num_samples: int = 2560,
        batches: int | None = None,
        residual: Literal["expand", "remove"] = "expand",
        exact_only: bool = False,
        min_kept: float = 0.05,
        scope: Literal["global", "layer"] = "global",
        unit_score: Literal["mean", "sum", "max"] = "mean",
        ignore: list[str] | None = None,
        protect_stem: bool = True,
        temperature: float | None = None,
        bias: Literal["none", "magnitude", "distance_from_init"] | None = None,
        keep_momentum: bool | None = None,
        track: bool | None = None,
        track_batches: int = 20,
        alpha: float | None = None,
        track_order: Literal["formula", "published"] = "formula",
        prune_lr: float | None = None,
        published_truncation: bool = False,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        logits_fn: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None,
        reset_best: bool = True,
        evaluate_cuts: bool = True,
        unpruned_path: str | None = None,
        rows_path: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_arguments(locals())
        self.measure = resolve_measure(measure)
        if thresholds is None:
            fraction = 0.75 if fraction is None else fraction
            rounds = 1 if rounds is None else rounds
        self.schedule = PruningSchedule(fraction, rounds, thresholds, published_truncation)
        self.times = CutTimes(self.schedule.num_rounds, warmup_epochs, every_n_epochs, epochs)
        self.target, self.residual, self.exact_only = target, residual, exact_only
        self.num_samples, self.batches = num_samples, batches
        self.min_kept, self.scope, self.unit_score = min_kept, scope, unit_score
        self.ignore, self.protect_stem = list(ignore or ()), protect_stem
        self.temperature = temperature
        # A measure that is by definition tracked brings its settings along; what is set explicitly always wins.
        self.keep_momentum = self.measure.is_tracked if keep_momentum is None else keep_momentum
        self.track = self.measure.is_tracked if track is None else track
        self.bias = self.measure.default_bias if bias is None and self.measure.is_tracked else bias
        if self.measure.is_tracked and alpha is not None:
            self.measure = copy.copy(self.measure)  # the object is the caller's
            self.measure.alpha = alpha
        self.alpha = self.measure.alpha if alpha is None else alpha
        self.track_batches, self.track_order = track_batches, track_order
        self.prune_lr = prune_lr
        self.loss_fn, self.logits_fn = loss_fn, logits_fn
        self.reset_best, self.evaluate_cuts = reset_best, evaluate_cuts
        self.unpruned_path, self.rows_path, self.seed = unpruned_path, rows_path, seed

        self.rows: list[dict[str, Any]] = []
        self.graph: ChannelGraph | None = None
        self._original_costs: dict[str, int] = {}
        self._initial: dict[str, Tensor] | None = None
        self._tracking = Tracking(track_batches, track_order, self._new_tracker)
        self._held_rate: HeldLearningRate | None = None
        self._saved_before_the_cut: dict[ModelCheckpoint, int] = {}
        self._rng_to_restore: list[Any] | None = None
        self._rng_of_ranks: list[Any] | None = None
        self._rows_file = RowsFile()

    # What others ask of it

    @property
    def cut_epochs(self) -> tuple[int, ...]:
        """The epochs, counted from 0, at whose start the rounds are cut."""
        assert self.times.epochs is not None
        return tuple(self.times.epochs)

    @property
    def rounds_done(self) -> int:
        """Rounds that were cut."""
        return len(self.rows)

    @property
    def finished(self) -> bool:
        """Whether all rounds were cut."""
        return self.rounds_done >= self.schedule.num_rounds

    @property
    def num_filters(self) -> int | None:
        """Filters present now in the layers that can be pruned; None before the network was traced."""
        return None if self.graph is None else self.graph.num_filters

    @property
    def held_lr(self) -> float | None:
        """The learning rate that is held at present, if one is."""
        return None if self.finished else self.prune_lr

    @property
    def _decides_otherwise(self) -> bool:
        """Whether `should_prune` is overridden: then nobody knows beforehand when rounds will be cut."""
        return getattr(self.should_prune, "__func__", None) is not PruningCallback.should_prune

    def phase(self, epoch: int) -> str:
        """What an epoch is for: "warmup", "pruning" (a round is still to come) or "final"."""
        if self.finished:
            return "final"
        return "warmup" if epoch < self.cut_epochs[0] - self.times.every_n_epochs else "pruning"

    # What a subclass may decide otherwise

    def should_prune(self, epoch: int) -> bool:
        """Whether the next round is to be cut at the start of this epoch; asked once an epoch until all rounds are done."""
        return not self.finished and epoch >= self.cut_epochs[self.rounds_done]

    def select(self, graph: ChannelGraph, scores: Scores) -> KeepPlan:
        """Which units stay in the next round, by their scores."""
        ignore = [*self.ignore, *(stem_groups(graph) if self.protect_stem else [])]
        options: dict[str, Any] = {"min_kept": self.min_kept, "ignore": ignore, "scope": self.scope}
        options["unit_score"] = self.unit_score
        k = self.rounds_done + 1
        if self.target == "filters":
            wanted = self.schedule.target(k, self._original_costs["filters"], graph.num_filters)
            return select_units(graph, scores, num_filters=wanted, **options)
        share = self.schedule.share(k, self._original_costs[self.target], costs_of(graph)[self.target])
        return select_units(graph, scores, share, target=self.target, **options)

    # Hooks of the Trainer

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses what cannot work, and makes the module's checkpoints carry its shape."""
        if stage == "fit":
            check_supported(trainer, self, PruningCallback)
            if not self.rows:
                self._rows_file = RowsFile()
            self._rows_file.refuse(trainer, self.rows_path)
            if self.loss_fn is None and not training_step_returns_loss(pl_module):
                raise ValueError(
                    f"PruningCallback: {type(pl_module).__name__} optimizes by hand or fetches its batches itself, so its "
                    "`training_step` cannot be asked for a loss: give `loss_fn(module, batch)`, which returns the scalar loss "
                    "to score by."
                )
            # Only here: until now the settings are plain attributes, and may be set anew.
            self._scoring = Scoring(
                self.measure,
                num_samples=self.num_samples,
                batches=self.batches,
                temperature=self.temperature,
                bias=self.bias,
                loss_fn=self.loss_fn,
                logits_fn=self.logits_fn,
                seed=self.seed,
            )
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the schedule, keeps the initial weights if a measure needs them, restores random states."""
        super().on_fit_start(trainer, pl_module)
        self._check_same_network(pl_module)
        if not self.finished:
            if not getattr(trainer, "fast_dev_run", False) and not self._decides_otherwise:
                self.times.check_fits(trainer.max_epochs)
            check_optimizers(
                trainer.strategy.optimizers,
                keep_state=self.keep_momentum,
                remedy="set keep_momentum to false",
            )
        if self.bias == "distance_from_init" and self._initial is None:
            self._initial = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        if self._initial is not None:
            self._initial = {name: tensor.to(pl_module.device) for name, tensor in self._initial.items()}
        if self.prune_lr is not None:
            self._held_rate = HeldLearningRate(self.prune_lr, trainer.strategy.optimizers, lambda: not self.finished)
        if self._rng_to_restore is not None:
            restore_rng_of_ranks(trainer, self._rng_to_restore)
            self._rng_to_restore = None
        self._say_how_it_tracks()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gathers the random states of all ranks, for checkpoints of the first epoch; writes the rows of a resumed run."""
        self._gather_rng(trainer)
        self._rows_file.choose(trainer)
        if self.rows:
            self._rows_file.write(trainer, self.rows, self.rows_path)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Traces the network before its first epoch; cuts the next round if it is due."""
        if self.graph is None:
            with isolated_rng(self.seed, 0, trainer.global_rank), torch.inference_mode(False):
                self._ensure_graph(pl_module, next(iter(self._scoring.batches(trainer, pl_module, self.rounds_done))))
        if not self.finished and self.should_prune(trainer.current_epoch):
            with isolated_rng(self.seed, self.rounds_done, trainer.global_rank), torch.inference_mode(False):
                self._cut(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the batch, if its step is to be tracked."""
        if self.track and not self.finished:
            self._tracking.begin(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Feeds a tracked measure with this step's gradients: of the global batch, unscaled, before clipping."""
        if self._tracking.is_in_a_step:
            with isolated_rng(self.seed, self.rounds_done), self._quiet_while_tracking(pl_module):
                self._tracking.before_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In the published order, takes in the weights after the step."""
        if self._tracking.is_in_a_step:
            with isolated_rng(self.seed, self.rounds_done), self._quiet_while_tracking(pl_module):
                self._tracking.after_step(pl_module)
            self._tracking.end()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gathers the random states of all ranks, so that a checkpoint can hold them."""
        self._gather_rng(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says which rounds were never cut, and has no file of before the last cut count as best."""
        now = last_saved_steps(trainer)
        for checkpoint, step in self._saved_before_the_cut.items():
            if now.get(checkpoint) == step:
                self._tell_outdated(checkpoint.best_model_path)
                checkpoint.best_model_path = ""
        self._saved_before_the_cut = {}
        if not self.finished and not getattr(trainer, "fast_dev_run", False) and not trainer.interrupted:
            rank_zero_warn(
                f"PruningCallback: training ended in epoch {trainer.current_epoch} after {self.rounds_done} of "
                f"{self.schedule.num_rounds} rounds; the others were due at epochs {list(self.cut_epochs[self.rounds_done :])}."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets go of the optimizers."""
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets go of the optimizers: a step that fails never came to its end, and a checkpoint may be saved now."""
        super().on_exception(trainer, pl_module, exception)
        self._let_go()

    def _let_go(self) -> None:
        self._tracking.end()
        if self._held_rate is not None:
            self._held_rate.remove()
            self._held_rate = None

    # Checkpoints

    # Not by `state_dict`: then Lightning would refuse two of these callbacks before `setup` could say what to do.

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds rounds done, the schedule, the graph, initial weights and random states, as plain data."""
        tracking = self._tracking.state_dict()
        checkpoint.setdefault("callbacks", {})[self.state_key] = {
            "version": 1,
            "rows": [dict(row) for row in self.rows],
            "rows_name": self._rows_file.name,
            "schedule": self._describe_schedule(),
            "graph": None if self.graph is None else self.graph.as_dict(),
            "original_costs": dict(self._original_costs),
            "initial": self._initial,
            "tracker": tracking["tracker"],
            "tracked_epoch": tracking["epoch"],
            "rng": self._rng_of_ranks if self._rng_of_ranks is not None else [capture_rng_state()],
        }

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes up where a checkpoint left off, to train on; a schedule that contradicts the rounds done is refused."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        state = copy.deepcopy(checkpoint.get("callbacks", {}).get(self.state_key))
        if state is None or trainer.state.fn != "fit":
            return  # a file that is only tested leaves the rows of the run alone
        self.rows, self._rows_file.name = state["rows"], state.get("rows_name") or "pruning.csv"
        self.graph = None if state["graph"] is None else ChannelGraph.from_dict(state["graph"])
        self._original_costs = state["original_costs"]
        self._initial = state["initial"] if self.bias == "distance_from_init" else None
        self._tracking.load_state_dict({"tracker": state["tracker"], "epoch": state.get("tracked_epoch")})
        check_same_schedule(state["schedule"], self._describe_schedule(), self.rounds_done)
        self._rng_to_restore = state["rng"]

    def _describe_schedule(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "measure": self.measure.name,
            "kept_after": [schedule.kept_after(k) for k in range(1, schedule.num_rounds + 1)],
            "cut_epochs": list(self.cut_epochs),
            "target": self.target,
        }

    def _gather_rng(self, trainer: pl.Trainer) -> None:
        # Here, not where a checkpoint is made: of one that is saved on an exception the other ranks know nothing.
        if num_ranks(trainer) > 1:
            self._rng_of_ranks = all_gather_objects(trainer, capture_rng_state())

    # One round

    def _cut(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        watch = Stopwatch()
        batches = self._scoring.batches(trainer, module, self.rounds_done)
        first = next(iter(batches))
        graph = self._ensure_graph(module, first)
        if self.unpruned_path is not None and self.rounds_done == 0:
            trainer.save_checkpoint(self.unpruned_path, weights_only=True)

        broadcast_buffers(trainer, module)
        before = self._scoring.loss_and_gradient_norm(trainer, module, first, self.rounds_done)
        scores = self._tracking.scores(trainer, module, first) if self.track else None
        if scores is None:
            scores = self._scoring.scores(trainer, module, batches, first, graph, self._initial, self.rounds_done)
        plan = KeepPlan.from_dict(broadcast(trainer, self.select(graph, scores).as_dict()))

        costs, groups = costs_of(graph), list(graph.groups)
        copies = [] if self._initial is None else [self._initial]
        apply_plan(trainer, module, graph, plan, keep_momentum=self.keep_momentum, copies=copies)
        after = self._scoring.loss_and_gradient_norm(trainer, module, first, self.rounds_done)

        row = {
            "round": self.rounds_done + 1,
            "epoch": trainer.current_epoch,
            "measure": self.measure.name,
            **self._asked_and_reached(costs, costs_of(graph)),
            "parameters": sum(p.numel() for p in module.parameters()),
            "macs": costs_of(graph)["macs"],
            "loss_before": before[0],
            "loss_after": after[0],
            "gradient_norm_before": before[1],
            "gradient_norm_after": after[1],
            "accuracy_after_cut": self._scoring.accuracy(trainer, module) if self.evaluate_cuts else "",
            **gone(groups, graph.groups),
            "seconds": watch.seconds(),
        }
        self.rows.append(row)
        self._tell(trainer, row)

    def _ensure_graph(self, module: pl.LightningModule, batch: Any) -> ChannelGraph:
        if self.graph is None:
            with without_side_effects(module):
                loss_fn = self.loss_fn or training_loss
                self.graph = trace_module(module, batch, loss_fn, residual=self.residual, exact_only=self.exact_only)
            self._original_costs = costs_of(self.graph)
            if not self.graph.groups:
                raise ValueError(
                    f"PruningCallback: no layer of {type(module).__name__} can be pruned: "
                    + "; ".join(f"{name}: {why}" for name, why in list(self.graph.frozen.items())[:3])
                )
            match_groups(self.graph.groups, self.graph.layers, self.ignore)  # refuses names that mean nothing
        return self.graph

    def _check_same_network(self, module: pl.LightningModule) -> None:
        """Refuses a network that is not the one of the rounds done."""
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        if self.graph is not None and any(self.graph.shapes.get(name) != shape for name, shape in shapes.items()):
            raise ValueError(
                f"PruningCallback: this {type(module).__name__} has other shapes than the network that the callback has pruned "
                f"({self.rounds_done} of {self.schedule.num_rounds} rounds): make a new PruningCallback for every network."
            )

    def _asked_and_reached(self, before: dict[str, int], after: dict[str, int]) -> dict[str, Any]:
        """What the next round was to take, and took, of the target and of the filters."""
        k, target, original = self.rounds_done + 1, self.target, self._original_costs
        filters_asked = self.schedule.target(k, original["filters"], before["filters"])
        return {
            "fraction_asked": 1 - self.schedule.kept_after(k),
            "fraction_reached": 1 - after[target] / original[target],
            "filters_asked": filters_asked if target == "filters" else "",
            "filters_removed": before["filters"] - after["filters"],
            "filters_left": after["filters"],
            "share_asked": self.schedule.share(k, original[target], before[target]),
            "share_reached": 1 - after[target] / before[target],
        }

    def _new_tracker(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tracker:
        return Tracker(
            self.measure,
            alpha=self.alpha,
            graph=self._ensure_graph(module, batch),
            bias=self.bias,
            initial_state=self._initial,
            reduce=mean_over_ranks(trainer),
            seed=self.seed + self.rounds_done,
            **(self._scoring.loss_options(module, batch) if self.measure.needs_hessian else {}),
        )

    def _quiet_while_tracking(self, module: pl.LightningModule) -> AbstractContextManager[object]:
        # Only a Hessian-gradient product runs the module.
        return without_side_effects(module) if self.measure.needs_hessian else nullcontext()

    # What is said

    def _tell(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        rank_zero_info(line_of(row, self.schedule.num_rounds, self.target))
        self._rows_file.write(trainer, self.rows, self.rows_path)
        for logger in trainer.loggers:
            logger.log_metrics(numbers_of(row), step=trainer.global_step)
        if self.reset_best:
            for path in reset_best_scores(trainer):
                self._tell_outdated(path)
            # Of those that monitor nothing the newest is best: they replace it at the next save, if there is one.
            self._saved_before_the_cut = last_saved_steps(trainer)

    def _tell_outdated(self, path: str) -> None:
        rank_zero_info(f"'{os.path.basename(path)}' is of the network before the last cut and does not count as best.")

    def _say_how_it_tracks(self) -> None:
        measure = self.measure
        if measure.is_tracked or self.track:
            rank_zero_info(
                f"PruningCallback: {measure.name} with track {self.track}, bias {self.bias or measure.default_bias}, "
                f"keep_momentum {self.keep_momentum}."
            )
        scored_in_training = self.track and measure.needs_gradients and not measure.needs_hessian
        if scored_in_training and self.temperature is not None:
            rank_zero_warn(
                f"PruningCallback: the temperature {self.temperature:g} has no effect, since tracked scores come from the "
                "gradients of training as they are: leave `temperature` out, or set track to false."
            )

"""PruningCallback: makes the network of any LightningModule physically smaller while it trains."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from gflow_pl.callbacks.calibration import calibration_batches, evaluation_batches, has_length
from gflow_pl.callbacks.held_rate import HeldRate
from gflow_pl.callbacks.loss import classifies, default_logits, quiet, training_loss
from gflow_pl.callbacks.ranks import all_gather_objects, broadcast, mean_over_ranks, num_ranks, share_buffers
from gflow_pl.callbacks.refusals import refuse_what_cannot_work
from gflow_pl.callbacks.rng import private_rng, restore_rng, rng_state
from gflow_pl.callbacks.round import (
    Stopwatch,
    apply_plan,
    count_accuracy,
    loss_and_gradient_norm,
    reset_best,
    stem_groups,
    trace_module,
    units_gone,
)
from gflow_pl.callbacks.settings import CutTimes
from gflow_pl.callbacks.structure import CarriesStructure
from gflow_pl.callbacks.tracking import StepGradients, in_window
from gflow_pl.channels import ChannelGraph
from gflow_pl.channels.plain import graph_from_plain, graph_to_plain
from gflow_pl.importance import Importance, Tracker, resolve_measure, score_filters
from gflow_pl.selection import PruningSchedule, cost_after, select_units
from gflow_pl.types import KeepPlan, Scores

__all__ = ["PruningCallback"]

log = logging.getLogger(__name__)


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
        reset_best: Whether monitored ModelCheckpoints start anew at each round, so that "best" is never another network.
        evaluate_cuts: Whether to measure the validation accuracy right after each cut (classifiers only).
        unpruned_path: File in which to keep the network as it is just before the first cut.
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
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.measure = resolve_measure(measure)
        if thresholds is None:
            fraction = 0.75 if fraction is None else fraction
            rounds = 1 if rounds is None else rounds
        self.schedule = PruningSchedule(fraction, rounds, thresholds, published_truncation)
        self.times = CutTimes(self.schedule.num_rounds, warmup_epochs, every_n_epochs, epochs)
        _check_numbers(num_samples, batches, min_kept, temperature, prune_lr, seed, track_batches, alpha)
        for name, value, choices in (
            ("target", target, ("filters", "parameters", "macs")),
            ("residual", residual, ("expand", "remove")),
            ("scope", scope, ("global", "layer")),
            ("unit_score", unit_score, ("mean", "sum", "max")),
            ("bias", bias, (None, "none", "magnitude", "distance_from_init")),
            ("track_order", track_order, ("formula", "published")),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, choices))}, got {value!r}.")
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
        self.unpruned_path, self.seed = unpruned_path, seed

        self.rows: list[dict[str, Any]] = []
        self.graph: ChannelGraph | None = None
        self._initial: dict[str, Tensor] | None = None
        self._original_costs: dict[str, int] = {}
        self._held_rate: HeldRate | None = None
        self._gradients: StepGradients | None = None
        self._pending_tracker: dict[str, Tensor] | None = None
        self._tracked_batch: tuple[int, Any] | None = None
        self._tracked_epoch: int | None = None
        self._pending_rng: list[Any] | None = None
        self._rng_of_ranks: list[Any] | None = None
        self._logits_known: bool | None = None

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

    def phase(self, epoch: int) -> str:
        """What an epoch is for: "warmup", "pruning" (a round is still to come) or "final"."""
        if self.finished:
            return "final"
        return "warmup" if epoch < self.cut_epochs[0] - self.times.every_n_epochs else "pruning"

    # What a subclass may decide otherwise

    def should_prune(self, epoch: int) -> bool:
        """Whether the next round is to be cut at the start of this epoch."""
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
        share = self.schedule.share(k, self._original_costs[self.target], _costs(graph)[self.target])
        return select_units(graph, scores, share, target=self.target, **options)

    # Hooks of the Trainer

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses what cannot work, and makes the module's checkpoints carry its shape."""
        if stage == "fit":
            refuse_what_cannot_work(trainer, pl_module, self)
            if not pl_module.automatic_optimization and self.loss_fn is None:
                raise ValueError(
                    f"PruningCallback: {type(pl_module).__name__} optimizes by hand, so its `training_step` cannot be asked for "
                    "a loss: give `loss_fn(module, batch)`, which returns the scalar loss to score by."
                )
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the schedule, keeps the initial weights if a measure needs them, restores random states."""
        super().on_fit_start(trainer, pl_module)
        if not getattr(trainer, "fast_dev_run", False) and not self.finished:
            self.times.check_fits(trainer.max_epochs)
        if self.bias == "distance_from_init" and self._initial is None:
            self._initial = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        if self._initial is not None:
            self._initial = {name: tensor.to(pl_module.device) for name, tensor in self._initial.items()}
        if self.prune_lr is not None:
            self._held_rate = HeldRate(self.prune_lr, trainer.strategy.optimizers, lambda: not self.finished)
        if self._pending_rng is not None:
            self._restore_rng(trainer)
        if self.measure.is_tracked or self.track:
            rank_zero_info(
                f"PruningCallback: {self.measure.name} with track {self.track}, bias "
                f"{self.bias or self.measure.default_bias}, keep_momentum {self.keep_momentum}."
            )
        if (
            self.track
            and self.temperature is not None
            and self.measure.needs_gradients
            and not self.measure.needs_hessian
        ):
            rank_zero_warn(
                f"PruningCallback: the temperature {self.temperature:g} has no effect, since tracked scores come from the "
                "gradients of training as they are: leave `temperature` out, or set track to false."
            )

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Traces the network before its first epoch; cuts every round that is due and not done."""
        if self.graph is None:
            with private_rng(self.seed, 0, trainer.global_rank), torch.inference_mode(False):
                self._ensure_graph(pl_module, next(iter(self._calibration(trainer, pl_module))))
        while self.should_prune(trainer.current_epoch):
            if self.finished:
                raise ValueError("PruningCallback: `should_prune` asks for more rounds than `rounds`.")
            with private_rng(self.seed, self.rounds_done, trainer.global_rank), torch.inference_mode(False):
                self._cut(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gathers the random states of all ranks, so that a checkpoint can hold them."""
        if num_ranks(trainer) > 1:
            self._rng_of_ranks = all_gather_objects(trainer, rng_state())

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says which rounds were never cut."""
        if not self.finished and not getattr(trainer, "fast_dev_run", False) and not trainer.interrupted:
            rank_zero_warn(
                f"PruningCallback: training ended in epoch {trainer.current_epoch} after {self.rounds_done} of "
                f"{self.schedule.num_rounds} rounds; the others were due at epochs {list(self.cut_epochs[self.rounds_done :])}."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets go of the optimizers."""
        if self._held_rate is not None:
            self._held_rate.remove()
            self._held_rate = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Rounds done, the schedule, the graph, initial weights and random states, as plain data."""
        return {
            "version": 1,
            "rows": [dict(row) for row in self.rows],
            "schedule": self._schedule_summary(),
            "graph": None if self.graph is None else graph_to_plain(self.graph),
            "original_costs": dict(self._original_costs),
            "initial": self._initial,
            "tracker": None if self._gradients is None else self._gradients.tracker.state_dict(),
            "tracked_epoch": self._tracked_epoch,
            "rng": self._rng_of_ranks if self._rng_of_ranks is not None else [rng_state()],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where a checkpoint left off; a schedule that contradicts the rounds done is refused."""
        self.rows = [dict(row) for row in state_dict["rows"]]
        self._check_same_schedule(state_dict["schedule"])
        graph = state_dict["graph"]
        self.graph = None if graph is None else graph_from_plain(graph)
        self._original_costs = dict(state_dict["original_costs"])
        self._initial = state_dict["initial"] if self.bias == "distance_from_init" else None
        self._pending_tracker, self._tracked_epoch = state_dict["tracker"], state_dict.get("tracked_epoch")
        self._pending_rng = state_dict["rng"]

    # One round

    def _cut(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        watch = Stopwatch()
        k = self.rounds_done + 1
        batches = self._calibration(trainer, module)
        first = next(iter(batches))
        graph = self._ensure_graph(module, first)
        if self.unpruned_path is not None and k == 1:
            trainer.save_checkpoint(self.unpruned_path, weights_only=True)

        share_buffers(trainer, module)
        before = self._measure_on(trainer, module, first)
        scores = self._score(trainer, module, batches, first)
        plan = KeepPlan.from_dict(broadcast(trainer, self.select(graph, scores).as_dict()))
        costs_before, groups_before = _costs(graph), list(graph.groups)
        copies = [] if self._initial is None else [self._initial]
        apply_plan(trainer, module, graph, plan, keep_momentum=self.keep_momentum, copies=copies)
        after = self._measure_on(trainer, module, first)
        costs = _costs(graph)

        asked = self.schedule.target(k, self._original_costs["filters"], costs_before["filters"])
        share = self.schedule.share(k, self._original_costs[self.target], costs_before[self.target])
        original = self._original_costs[self.target]
        row = {
            "round": k,
            "epoch": trainer.current_epoch,
            "measure": self.measure.name,
            "fraction_asked": 1 - self.schedule.kept_after(k),
            "fraction_reached": 1 - costs[self.target] / original,
            "filters_asked": asked if self.target == "filters" else "",
            "filters_removed": costs_before["filters"] - costs["filters"],
            "filters_left": costs["filters"],
            "share_asked": share,
            "share_reached": 1 - costs[self.target] / costs_before[self.target],
            "parameters": sum(p.numel() for p in module.parameters()),
            "macs": costs["macs"],
            "loss_before": before[0],
            "loss_after": after[0],
            "gradient_norm_before": before[1],
            "gradient_norm_after": after[1],
            "accuracy_after_cut": self._accuracy(trainer, module),
            "removed_by_layer": units_gone(groups_before, graph.groups),
            "seconds": watch.seconds(),
        }
        self.rows.append(row)
        self._tell(trainer, row)

    def _ensure_graph(self, module: pl.LightningModule, batch: Any) -> ChannelGraph:
        if self.graph is None:
            with quiet(module):
                self.graph = trace_module(module, batch, residual=self.residual, exact_only=self.exact_only)
            self._original_costs = _costs(self.graph)
            if not self.graph.groups:
                raise ValueError(
                    f"PruningCallback: no layer of {type(module).__name__} can be pruned: "
                    + "; ".join(f"{name}: {why}" for name, why in list(self.graph.frozen.items())[:3])
                )
        return self.graph

    def _calibration(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterable[Any]:
        if self.batches is None and not has_length(trainer.train_dataloader):
            raise ValueError("PruningCallback: the training data has no length, so say how many `batches` to score on.")
        return calibration_batches(trainer, module, seed=1000 * self.seed + self.rounds_done)

    def _score(self, trainer: pl.Trainer, module: pl.LightningModule, batches: Iterable[Any], first: Any) -> Scores:
        if self.track:
            tracked = self._tracked_scores(trainer, module, first)
            if tracked is not None:
                return tracked
        options = self._loss_options(module, first)
        if self.batches is None:
            options["num_samples"] = math.ceil(self.num_samples / num_ranks(trainer))
        else:
            batches = islice(iter(batches), self.batches)
        with quiet(module):
            return score_filters(
                module,
                self.measure,
                batches,
                graph=self.graph,
                initial_state=self._initial,
                bias=self.bias,
                reduce=mean_over_ranks(trainer),
                seed=self.seed + self.rounds_done,
                **options,
            )

    def _loss_options(self, module: pl.LightningModule, batch: Any) -> dict[str, Any]:
        """What scores are taken from: logits at the measure's temperature, or the module's own loss."""
        if self._uses_logits(module, batch):
            return {"logits_fn": self.logits_fn or default_logits, "temperature": self.temperature}
        return {"loss_fn": self.loss_fn or training_loss}

    def _uses_logits(self, module: pl.LightningModule, batch: Any) -> bool:
        """Whether to score by the cross-entropy of logits / temperature, not by the module's own loss."""
        wants = self.temperature is not None or self.measure.temperature not in (None, 1.0) or self.measure.needs_labels
        if self.logits_fn is not None or not wants:
            return self.logits_fn is not None and wants
        if self._logits_known is None:
            self._logits_known = self.loss_fn is None and classifies(module, batch)
            if not self._logits_known:
                rank_zero_info(
                    f"PruningCallback: {type(module).__name__} gives no (logits, labels), so its loss is taken as it is, without "
                    "a temperature, on batches that are not balanced over classes; a `logits_fn` would change that."
                )
        return self._logits_known

    def _measure_on(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> list[float]:
        """Loss and gradient norm on one batch of each rank, averaged."""
        with quiet(module), private_rng(self.seed, self.rounds_done):
            both = loss_and_gradient_norm(module, batch, self.loss_fn or training_loss)
        reduce = mean_over_ranks(trainer)
        return (both if reduce is None else reduce(both)).tolist()

    def _accuracy(self, trainer: pl.Trainer, module: pl.LightningModule) -> float | str:
        """Share of right answers on the validation data; "" if it is not asked for or the module does not classify."""
        limit = trainer.limit_val_batches
        if not self.evaluate_cuts or limit == 0:
            return ""
        batches = evaluation_batches(trainer, module, limit)
        if batches is None:
            return ""
        logits_fn = self.logits_fn or default_logits
        batches = iter(batches)
        first = next(batches, None)
        if first is None or (self.logits_fn is None and not classifies(module, first)):
            return ""
        with quiet(module):
            counts = count_accuracy(module, _chain(first, batches), logits_fn)
        reduce = mean_over_ranks(trainer)
        right, total = (counts if reduce is None else reduce(counts)).tolist()
        return right / total

    def _tell(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        accuracy = row["accuracy_after_cut"]
        rank_zero_info(
            f"Round {row['round']} of {self.schedule.num_rounds} by {row['measure']} (epoch {row['epoch']}): asked for "
            f"{row['fraction_asked']:.1%} of the {self.target}, reached {row['fraction_reached']:.1%}; "
            f"{row['filters_removed']} filters gone, {row['filters_left']} left, {row['parameters']:,} parameters, "
            f"{row['macs']:,} multiply-accumulates; loss {row['loss_before']:.4f} -> {row['loss_after']:.4f}"
            + (f", accuracy after the cut {accuracy:.2%}" if accuracy != "" else "")
            + f"; {row['seconds']:.1f} s"
        )
        numbers = {f"pruning/{name}": value for name, value in row.items() if isinstance(value, (int, float))}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        if self.reset_best:
            for path in reset_best(trainer):
                rank_zero_info(
                    f"'{os.path.basename(path)}' is of the network before this cut and no longer counts as best."
                )

    # Resuming

    def _schedule_summary(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "measure": self.measure.name,
            "kept_after": [schedule.kept_after(k) for k in range(1, schedule.num_rounds + 1)],
            "cut_epochs": list(self.cut_epochs),
            "target": self.target,
        }

    def _check_same_schedule(self, saved: dict[str, Any]) -> None:
        now, done = self._schedule_summary(), self.rounds_done
        if saved == now:
            return
        for name in ("kept_after", "cut_epochs"):
            if saved[name][:done] != now[name][:done]:
                raise ValueError(
                    f"PruningCallback: the checkpoint has done {done} rounds with {name} {saved[name][:done]}, but the settings "
                    f"now say {now[name][:done]}: resume with the settings of the run, or start anew from its weights."
                )
        changed = [f"{name} {saved[name]} -> {now[name]}" for name in now if saved[name] != now[name]]
        rank_zero_warn(f"PruningCallback: the schedule has changed since the checkpoint: {'; '.join(changed)}.")

    def _restore_rng(self, trainer: pl.Trainer) -> None:
        states, self._pending_rng = self._pending_rng, None
        assert states is not None
        if len(states) == num_ranks(trainer):
            restore_rng(states[trainer.global_rank])
        else:
            rank_zero_warn(
                f"PruningCallback: the checkpoint was written by {len(states)} processes and is resumed by {num_ranks(trainer)}, "
                "so random numbers will differ from an uninterrupted run."
            )

    # Tracking: scores from the training's own gradients

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the batch, if its step is to be tracked; the average begins anew in every epoch."""
        self._tracked_batch = None
        if self.track and not self.finished and in_window(trainer, batch_idx, self.track_batches):
            if self._tracked_epoch != trainer.current_epoch:
                self._gradients, self._pending_tracker = None, None
            if self._gradients is None:
                self._gradients = self._step_gradients(trainer, pl_module, batch)
                self._tracked_epoch = trainer.current_epoch
            self._tracked_batch = (batch_idx, batch)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Feeds a tracked measure with this step's gradients."""
        if self._tracked_batch is not None and self._gradients is not None:
            with private_rng(self.seed, self.rounds_done), quiet(pl_module):
                scales = getattr(trainer.precision_plugin, "scaler", None) is not None
                self._gradients.before_step(pl_module, optimizer, self._tracked_batch[1], may_overflow=scales)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In the published order, takes in the weights after the step."""
        if self._tracked_batch is not None and self._gradients is not None:
            with private_rng(self.seed, self.rounds_done), quiet(pl_module):
                self._gradients.after_step(pl_module, self._tracked_batch[1])
            self._tracked_batch = None

    def _step_gradients(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> StepGradients:
        """An average that begins, or that goes on where the checkpoint left it."""
        tracker = self._new_tracker(trainer, module, batch)
        if self._pending_tracker is not None:
            tracker.load_state_dict({name: value.to(module.device) for name, value in self._pending_tracker.items()})
            self._pending_tracker = None
        return StepGradients(tracker, self.track_order)

    def _new_tracker(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tracker:
        self._ensure_graph(module, batch)
        options = self._loss_options(module, batch) if self.measure.needs_hessian else {}
        return Tracker(
            self.measure,
            alpha=self.alpha,
            graph=self.graph,
            bias=self.bias,
            initial_state=self._initial,
            reduce=mean_over_ranks(trainer),
            seed=self.seed + self.rounds_done,
            **options,
        )

    def _tracked_scores(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Scores | None:
        """The average of the last epoch; None if no step was tracked."""
        if self._pending_tracker is not None and self._gradients is None:
            self._gradients = self._step_gradients(trainer, module, batch)
        gradients, self._gradients, self._pending_tracker = self._gradients, None, None
        if gradients is None or gradients.tracker.num_updates == 0:
            rank_zero_warn(
                "PruningCallback: no step was tracked before this round, so it is scored by passes of its own."
            )
            return None
        return gradients.tracker.scores()


def _chain(first: Any, rest: Iterable[Any]) -> Iterable[Any]:
    yield first
    yield from rest


def _costs(graph: ChannelGraph) -> dict[str, int]:
    """Filters, parameters and multiply-accumulates of the network as it is now."""
    parameters, macs = cost_after(graph)
    return {"filters": graph.num_filters, "parameters": parameters, "macs": macs}


def _check_numbers(
    num_samples: int,
    batches: int | None,
    min_kept: float,
    temperature: float | None,
    prune_lr: float | None,
    seed: int,
    track_batches: int,
    alpha: float | None,
) -> None:
    for name, value in (("num_samples", num_samples), ("batches", batches), ("track_batches", track_batches)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a whole number >= 1, got {value!r}.")
    if alpha is not None and not 0 < alpha <= 1:
        raise ValueError(f"`alpha` must be in (0, 1], got {alpha!r}.")
    if not 0 <= min_kept <= 1:
        raise ValueError(f"`min_kept` must be in [0, 1], got {min_kept!r}.")
    for name, number in (("temperature", temperature), ("prune_lr", prune_lr)):
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise ValueError(f"`{name}` must be > 0, got {number!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a whole number >= 0, got {seed!r}.")

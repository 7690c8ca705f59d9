"""Scores from the gradients of the training's own steps, averaged by a `Tracker`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gflow_pl.callbacks.lightning.packages import both_packages
from gflow_pl.callbacks.lightning.precision import gradient_scale
from gflow_pl.callbacks.lightning.ranks import mean_over_ranks
from gflow_pl.callbacks.lightning.rng import isolated_rng
from gflow_pl.callbacks.lightning.silence import without_side_effects
from gflow_pl.callbacks.pruning_settings import ScoringSettings, TrackingSettings
from gflow_pl.callbacks.scoring import Scoring
from gflow_pl.common.lightning_package import pl
from gflow_pl.importance import Tracker
from gflow_pl.importance.derived_weights import DerivedWeightGradients
from gflow_pl.importance.reduction import Reduce
from gflow_pl.values import ChannelGraph, Scores
from gflow_pl.values.choices import TrackOrder

__all__ = [
    "RoundInputs",
    "StepGradients",
    "TrackedScoring",
    "is_tracked_batch",
    "report_tracking",
]


def is_tracked_batch(trainer: pl.Trainer, batch_idx: int, track_batches: int) -> bool:
    """Return whether a batch belongs to one of the last `track_batches` optimizer steps of its epoch.

    Earlier steps would not change the average: with alpha 0.8, the step before the last twenty has a weight of 1e-14.
    Every batch is tracked if the length of the epoch is not known.
    """
    if trainer.num_training_batches == float("inf"):
        return True
    size = trainer.accumulate_grad_batches  # batches in a step; the last step of an epoch may have fewer
    return batch_idx // size >= math.ceil(trainer.num_training_batches / size) - track_batches


def report_tracking(scoring: ScoringSettings, tracking: TrackingSettings, keep_momentum: bool) -> None:
    """Log the settings that a tracked measure has chosen; warn of a temperature that has no effect."""
    measure = scoring.measure
    if measure.is_tracked or tracking.track:
        pl.utilities.rank_zero_info(
            f"PruningCallback: {measure.name} with track {tracking.track}, bias "
            f"{scoring.bias or measure.default_bias}, keep_momentum {keep_momentum}."
        )
    uses_training_gradients = tracking.track and measure.needs_gradients and not measure.needs_hessian
    if uses_training_gradients and scoring.temperature is not None:
        pl.utilities.rank_zero_warn(
            f"PruningCallback: the temperature {scoring.temperature:g} has no effect, since tracked scores come from "
            "the gradients of training as they are: leave `temperature` out, or set track to false."
        )


@dataclass(frozen=True)
class RoundInputs:
    """Inputs of the scores of one round, besides the module and its batches.

    Args:
        scoring: The measure and its loss.
        tracking: How scores are averaged over training steps.
        graph: The traced network.
        initial_state: Initial parameters by name; None if no bias needs them.
        rounds_done: Number of earlier rounds, which enters all seeds.
    """

    scoring: Scoring
    tracking: TrackingSettings
    graph: ChannelGraph
    initial_state: dict[str, Tensor] | None
    rounds_done: int

    def new_tracker(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object) -> Tracker:
        """Return a tracker for the module in its present shape, whose average is still zero.

        Args:
            trainer: The Trainer.
            module: The module.
            batch: A training batch, which tells whether the module is a classifier. Only measures that need a separate
                pass (of Hessian products, of activations) run the module on it.
        """
        settings = self.scoring.settings
        loss_options: Mapping[str, Any] = {}
        if settings.measure.needs_own_pass:
            with without_side_effects(module) as effects:
                loss_options = self.scoring.loss_options(module, batch, effects)
        return Tracker(
            settings.measure,
            alpha=self.tracking.alpha,
            graph=self.graph,
            bias=settings.bias,
            initial_state=self.initial_state,
            reduce=mean_over_ranks(trainer),
            seed=settings.seed + self.rounds_done,
            **loss_options,
        )


class StepGradients:
    """Feeds a `Tracker` with the gradients of training steps: of the global batch, unscaled, before clipping.

    Args:
        tracker: The tracker.
        order: "formula" combines each gradient with the weights before its step; "published" with the weights after it,
            as the published code does.
        reduce: Averages a tensor over the ranks. Gradients of parameters are averaged by DDP already; gradients of
            derived weights, such as those of a parametrization, are not.
    """

    def __init__(self, tracker: Tracker, order: TrackOrder, reduce: Reduce | None = None) -> None:
        self.tracker, self._order, self._reduce = tracker, order, reduce
        self._names: list[str] | None = None
        self._derived: DerivedWeightGradients | None = None
        self._gradients_before_step: dict[str, Tensor] | None = None

    def start_recording(self, module: pl.LightningModule) -> None:
        """Record the gradients of derived weights, which have no ``.grad``, from the next forward pass on."""
        if self._derived is None:
            self._derived = DerivedWeightGradients(module, self._wanted_names(module))
        self._derived.start()

    def stop_recording(self) -> None:
        """Stop recording the gradients of derived weights."""
        if self._derived is not None:
            self._derived.stop()

    def before_step(
        self,
        module: pl.LightningModule,
        optimizer: Optimizer,
        batch: object,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Take the gradients that an optimizer is about to use, after accumulation and reduction.

        Args:
            module: The module.
            optimizer: The optimizer; parameters of other optimizers are left out.
            batch: The batch of the step.
            scaler: Gradient scaler of the training. It skips a step whose gradients are not finite, so such a step is
                not tracked either.
        """
        # Gradients of this optimizer's parameters, and of the weights derived from them.
        wanted = set(self._wanted_names(module))
        parameter_ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gradients = {
            name: p.grad
            for name, p in module.named_parameters()
            if name in wanted and id(p) in parameter_ids and p.grad is not None
        }
        derived = {} if self._derived is None else self._derived.collect(parameter_ids, self._reduce)
        if wanted and not gradients and not derived:
            return

        # Unscale them.
        if scaler is not None:
            if not _has_finite_gradients(optimizer):
                return
            scale = scaler.scale(torch.ones((), device=module.device))
            derived = {name: gradient / scale for name, gradient in derived.items()}
            if gradient_scale(scaler, optimizer, module.device) is not None:
                gradients = {name: gradient / scale for name, gradient in gradients.items()}

        # Track them now, or with the weights after the step.
        gradients |= derived
        if self._order == "formula":
            self.tracker.update(module, gradients, batch=batch)
        else:
            # Clipping changes gradients in place, hence the copies. Several optimizers may step on one batch.
            copies = {name: gradient.detach().clone() for name, gradient in gradients.items()}
            self._gradients_before_step = {**(self._gradients_before_step or {}), **copies}

    def after_step(self, module: pl.LightningModule, batch: object) -> None:
        """In the order "published", track the step's gradients with the weights after the step."""
        if self._gradients_before_step is not None:
            gradients, self._gradients_before_step = self._gradients_before_step, None
            self.tracker.update(module, gradients, batch=batch)

    def _wanted_names(self, module: pl.LightningModule) -> list[str]:
        if self._names is None:
            self._names = self.tracker.names(module)
        return self._names


class TrackedScoring:
    """The average of a measure over the last steps of the current epoch. Every epoch starts a new average."""

    def __init__(self) -> None:
        self._steps: StepGradients | None = None
        self._inputs: RoundInputs | None = None  # of the current step; None outside of a tracked step
        self._batch: object = None
        self._epoch: int | None = None
        self._restored: dict[str, Tensor] | None = None
        self._has_logged = False

    def begin_batch(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, batch_idx: int, inputs: RoundInputs
    ) -> None:
        """Track the step of a batch that is about to be trained on, if it is one of the last steps of the epoch.

        Args:
            trainer: The Trainer.
            module: The module.
            batch: The batch.
            batch_idx: Its position in the epoch.
            inputs: Inputs of the next round's scores.
        """
        if not is_tracked_batch(trainer, batch_idx, inputs.tracking.track_batches):
            return
        if self._epoch != trainer.current_epoch:
            self._steps, self._restored = None, None
        if self._steps is None:
            self._steps = self._started_or_resumed(trainer, module, batch, inputs)
            self._epoch = trainer.current_epoch
        self._batch, self._inputs = batch, inputs
        # Modules that step for themselves may discard gradients, which would then stay in the derived weights.
        if module.automatic_optimization and not _overrides_optimizer_step(module):
            self._steps.start_recording(module)

    def before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Take the gradients that an optimizer is about to use, if the current step is tracked."""
        if self._inputs is not None and self._steps is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            with _isolated(module, self._inputs):
                self._steps.before_step(module, optimizer, self._batch, scaler=scaler)

    def after_optimizer_step(self, module: pl.LightningModule) -> None:
        """In the order "published", track the step's gradients with the weights after the step."""
        if self._inputs is not None and self._steps is not None:
            with _isolated(module, self._inputs):
                self._steps.after_step(module, self._batch)

    def end_batch(self) -> None:
        """Release the batch, and remove the hooks on the module; harmless outside of a tracked step."""
        self._batch, self._inputs = None, None
        if self._steps is not None:
            self._steps.stop_recording()

    def scores(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, inputs: RoundInputs
    ) -> Scores | None:
        """Return the scores of the average, and discard it; None, with a warning, if no step was tracked.

        Args:
            trainer: The Trainer.
            module: The module.
            batch: A training batch.
            inputs: Inputs of the round's scores.
        """
        self.end_batch()
        if self._restored is not None and self._steps is None:
            self._steps = self._started_or_resumed(trainer, module, batch, inputs)
        steps, self._steps, self._restored = self._steps, None, None
        if steps is None or steps.tracker.num_updates == 0:
            pl.utilities.rank_zero_warn(
                "PruningCallback: no step was tracked before this round, so filters are scored by extra passes instead."
            )
            return None
        return steps.tracker.scores()

    def state_dict(self) -> dict[str, Any]:
        """Return the average and its epoch."""
        return {"tracker": None if self._steps is None else self._steps.tracker.state_dict(), "epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the average of a checkpoint."""
        self.end_batch()
        self._steps, self._restored, self._epoch = None, state["tracker"], state["epoch"]

    def _started_or_resumed(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, inputs: RoundInputs
    ) -> StepGradients:
        tracker = inputs.new_tracker(trainer, module, batch)
        # Every epoch and every rank builds a tracker; only the first one of rank 0 logs.
        tracker.has_logged, self._has_logged = self._has_logged or trainer.global_rank > 0, True
        if self._restored is not None:
            tracker.load_state_dict({name: value.to(module.device) for name, value in self._restored.items()})
            self._restored = None
        return StepGradients(tracker, inputs.tracking.track_order, mean_over_ranks(trainer))


@contextmanager
def _isolated(module: pl.LightningModule, inputs: RoundInputs) -> Iterator[None]:
    """Leave random generators alone, and undo side effects on the module if the measure runs it."""
    settings = inputs.scoring.settings
    runs_module = settings.measure.needs_own_pass
    with (
        isolated_rng(settings.seed, inputs.rounds_done),
        without_side_effects(module) if runs_module else nullcontext(),
    ):
        yield


def _overrides_optimizer_step(module: pl.LightningModule) -> bool:
    """Return whether a class below LightningModule defines `optimizer_step`."""
    definer = next(cls for cls in type(module).__mro__ if "optimizer_step" in vars(cls))
    return definer not in both_packages(pl.LightningModule)


def _has_finite_gradients(optimizer: Optimizer) -> bool:
    """Return whether all gradients of an optimizer are finite: the condition on which a gradient scaler steps."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(bool(torch.isfinite(norm)) for norm in torch._foreach_norm(gradients)) if gradients else True

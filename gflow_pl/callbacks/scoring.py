"""Measurements of a round: scores of filters, loss and gradient norm on training batches, validation accuracy."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gflow_pl.callbacks.lightning.loaders import DatasetKeysError, custom_sampler_names, has_length
from gflow_pl.callbacks.lightning.precision import with_true_precision
from gflow_pl.callbacks.lightning.ranks import broadcast, mean_over_ranks, num_ranks
from gflow_pl.callbacks.lightning.rng import isolated_rng
from gflow_pl.callbacks.lightning.scoring_batches import calibration_batches, validation_batches
from gflow_pl.callbacks.lightning.silence import SideEffects
from gflow_pl.callbacks.lightning.training_loss import (
    default_logits,
    is_classifier,
    training_loss,
    training_step_returns_loss,
)
from gflow_pl.callbacks.pruning_settings import ScoringSettings
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import pl
from gflow_pl.importance import score_filters
from gflow_pl.importance.gradients import LogitsFn, LossFn
from gflow_pl.values import ChannelGraph, Scores

__all__ = ["LossAndNorm", "Scoring"]


class LossAndNorm(NamedTuple):
    """Loss on a batch, and L2 norm of its gradient; "" if the loss cannot be computed and the measure needs none."""

    loss: float | str
    gradient_norm: float | str


class Scoring:
    """Measures a module on batches of its training and validation data.

    A round enters evaluation mode and `without_side_effects` once for all measurements before the cut, and once for
    those after it: the methods that run the module rely on that. They take the `SideEffects` of that block where they
    run the module twice, so that the first pass does not influence the second.

    Args:
        settings: The measure, its loss and its batches.
    """

    def __init__(self, settings: ScoringSettings) -> None:
        self._settings = settings
        self._loss_fn: LossFn = training_loss if settings.loss_fn is None else with_true_precision(settings.loss_fn)
        self._logits_fn = None if settings.logits_fn is None else with_true_precision(settings.logits_fn)
        self._module_is_classifier: bool | None = None
        self._messages = _OncePerMessage()

    @property
    def settings(self) -> ScoringSettings:
        """The measure, its loss and its batches."""
        return self._settings

    @property
    def loss_fn(self) -> LossFn:
        """The loss to score by, run in the Trainer's precision: the user's, or that of the module's training step."""
        return self._loss_fn

    def calibration_batches(
        self, trainer: pl.Trainer, module: pl.LightningModule, rounds_done: int
    ) -> Iterable[object]:
        """Return the training batches of the next round; every iteration yields the same ones.

        Raises:
            SettingsError: The data has no length, and `batches` is not set.
        """
        if self._settings.batches is None and not has_length(trainer.train_dataloader):
            raise SettingsError(
                "PruningCallback: the training data has no length: set `batches` to the number of batches to score on."
            )
        self._report_custom_samplers(trainer.train_dataloader, "filters are scored")
        return calibration_batches(trainer, module, seed=1000 * self._settings.seed + rounds_done)

    def scores(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        batches: Iterable[object],
        first_batch: object,
        graph: ChannelGraph,
        initial_state: Mapping[str, Tensor] | None,
        rounds_done: int,
        effects: SideEffects,
    ) -> Scores:
        """Score all filters by passes over the calibration batches.

        Args:
            trainer: The Trainer.
            module: The module.
            batches: The calibration batches.
            first_batch: The first of them.
            graph: The traced network.
            initial_state: Initial parameters by name, for the bias "distance_from_init".
            rounds_done: Number of earlier rounds, which enters the seed.
            effects: Side effects on the module, undone before the passes.

        Returns:
            Scores of all ranks' batches together: of `num_samples` images, or of `batches` batches on each rank.
        """
        settings, options = self._settings, dict(self.loss_options(module, first_batch, effects))
        if settings.batches is None:
            options["num_samples"] = math.ceil(settings.num_samples / num_ranks(trainer))
        else:
            batches = islice(iter(batches), settings.batches)
        with self._messages.filtering("gflow_pl.importance.score"):
            return score_filters(
                module,
                settings.measure,
                batches,
                graph=graph,
                initial_state=initial_state,
                bias=settings.bias,
                reduce=mean_over_ranks(trainer),
                seed=settings.seed + rounds_done,
                **options,
            )

    def loss_options(self, module: pl.LightningModule, batch: object, effects: SideEffects) -> Mapping[str, Any]:
        """Return the loss that gradients are taken of, as arguments of `score_filters` and `Tracker`.

        It is the cross-entropy of the module's logits at the measure's temperature, or else the training loss.
        """
        if self._scores_by_logits(module, batch, effects):
            return {"logits_fn": self._logits_fn or default_logits, "temperature": self._settings.temperature}
        return {"loss_fn": self._loss_fn}

    def _scores_by_logits(self, module: pl.LightningModule, batch: object, effects: SideEffects) -> bool:
        # Only a temperature, or samples that are balanced over the classes, need logits and labels.
        measure = self._settings.measure
        has_temperature = self._settings.temperature is not None or measure.temperature not in (None, 1.0)
        if not has_temperature and not measure.needs_labels:
            return False
        if self._logits_fn is not None:
            return True
        # Whether the module is a classifier is found out by a forward pass, once.
        if self._module_is_classifier is None:
            self._module_is_classifier = self._settings.loss_fn is None and is_classifier(module, batch)
            effects.undo()
            if not self._module_is_classifier:
                pl.utilities.rank_zero_info(
                    f"PruningCallback: the forward pass of {type(module).__name__} and its batches do not give logits "
                    "and labels, so filters are scored by the module's loss as it is, without a temperature, on "
                    "batches that are not balanced over classes: set `logits_fn` to change that."
                )
        return self._module_is_classifier

    def loss_and_gradient_norm(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, rounds_done: int
    ) -> LossAndNorm:
        """Return the loss and the L2 norm of its gradient on one batch of each rank, averaged over the ranks.

        ``.grad`` does not change. Every call draws the same random numbers, so that values before and after a cut
        compare.
        """
        if not self._needs_loss and not self._has_loss(module):
            return LossAndNorm("", "")
        parameters = [p for p in module.parameters() if p.requires_grad and p.numel()]
        with isolated_rng(self._settings.seed, rounds_done), torch.enable_grad():
            try:
                loss = self._loss_fn(module, batch)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            except Exception as error:  # the module's own code may raise anything in evaluation mode
                if self._needs_loss or self._settings.loss_fn is not None:
                    raise
                self._report_missing_loss(module, error)
                loss, gradients = None, ()
        if loss is None:
            both = torch.full((2,), math.nan, device=module.device)
        else:
            squares = [gradient.detach().float().square().sum() for gradient in gradients if gradient is not None]
            norm = torch.stack(squares).sum().sqrt() if squares else loss.new_zeros(())
            both = torch.stack([loss.detach().float(), norm.float()])
        reduce = mean_over_ranks(trainer)  # all ranks take part, also where the loss could not be computed
        both = both if reduce is None else reduce(both)
        return LossAndNorm("", "") if loss is None else LossAndNorm(*both.tolist())

    @property
    def _needs_loss(self) -> bool:
        """Whether scores cannot be computed without a loss."""
        return self._settings.measure.needs_batches

    def _has_loss(self, module: pl.LightningModule) -> bool:
        return self._settings.loss_fn is not None or training_step_returns_loss(module)

    def _report_missing_loss(self, module: pl.LightningModule, error: Exception) -> None:
        message = (
            f"PruningCallback: `training_step` of {type(module).__name__} does not run in evaluation mode "
            f"({type(error).__name__}), so the loss before and after a cut is not measured. The measure "
            f"{self._settings.measure.name!r} does not need it."
        )
        if self._messages.is_new(message):
            pl.utilities.rank_zero_info(message)

    def accuracy(self, trainer: pl.Trainer, module: pl.LightningModule, effects: SideEffects) -> float | None:
        """Return the share of correct predictions on the validation data, in [0, 1], over all ranks.

        None if there is no validation data, or if the module is not a classifier.

        Args:
            trainer: The Trainer.
            module: The module.
            effects: Side effects on the module, undone before examples are counted.
        """
        limit = trainer.limit_val_batches
        batches = None if limit == 0 else validation_batches(trainer, module, limit)
        if batches is None:
            return None
        self._report_custom_samplers(trainer.val_dataloaders, "accuracy after a cut is measured")

        # Look at the first batch. All ranks go on or none, also those whose share of the data is empty.
        rest = iter(batches)
        try:
            start = list(islice(rest, 1))
        except DatasetKeysError:  # the accuracy is optional: training goes on without it
            start = []
        has_logits = bool(start) and (self._logits_fn is not None or is_classifier(module, start[0]))
        effects.undo()
        if not broadcast(trainer, has_logits):
            return None

        # Count over all batches of all ranks.
        counts = _count_correct(module, chain(start, rest), self._logits_fn or default_logits)
        reduce = mean_over_ranks(trainer)
        correct, total = (counts if reduce is None else reduce(counts)).tolist()
        share: float = correct / total
        return share

    def _report_custom_samplers(self, loaders: object, what: str) -> None:
        for name in custom_sampler_names(loaders):
            message = (
                f"PruningCallback: {what} on the whole data set: the custom sampler {name} is ignored. To restrict the "
                "data set, wrap it in a Subset."
            )
            if self._messages.is_new(message):
                pl.utilities.rank_zero_info(message)


class _OncePerMessage:
    """Logs every message at most once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def is_new(self, message: str) -> bool:
        """Return whether a message has not been seen before, and remember it."""
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new

    @contextmanager
    def filtering(self, logger_name: str) -> Iterator[None]:
        """Drop repeated messages of a logger for the time of a block."""
        logger = logging.getLogger(logger_name)

        def is_new(record: logging.LogRecord) -> bool:
            return self.is_new(record.getMessage())

        logger.addFilter(is_new)
        try:
            yield
        finally:
            logger.removeFilter(is_new)


def _count_correct(module: pl.LightningModule, batches: Iterable[object], logits_fn: LogitsFn) -> Tensor:
    """Return (2,) the number of correct predictions and of examples; float64, on the module's device."""
    device = next(module.parameters()).device
    correct, total = torch.zeros((), device=device, dtype=torch.float64), 0
    with torch.no_grad():
        for batch in batches:
            logits, labels = logits_fn(module, batch)
            correct += (logits.argmax(dim=1) == labels).sum()
            total += len(labels)
    return torch.stack([correct, torch.full_like(correct, total)])

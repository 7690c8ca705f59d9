"""What a round is measured on: batches of the training data, the loss on them, accuracy on the validation data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from gflow_pl.callbacks.lightning.loaders import (
    DatasetKeysError,
    custom_sampler_names,
    has_length,
)
from gflow_pl.callbacks.lightning.precision import with_true_precision
from gflow_pl.callbacks.lightning.ranks import broadcast, mean_over_ranks, num_ranks
from gflow_pl.callbacks.lightning.rng import isolated_rng
from gflow_pl.callbacks.lightning.scoring_batches import calibration_batches, validation_batches
from gflow_pl.callbacks.lightning.silence import without_side_effects
from gflow_pl.callbacks.lightning.training_loss import (
    default_logits,
    is_classifier,
    training_loss,
)
from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.importance import Importance, score_filters
from gflow_pl.values import ChannelGraph, Scores

__all__ = ["Scoring"]


class _Once:
    """Lets each text be said once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def is_new(self, text: str) -> bool:
        """Whether a text was not said before; from now on it was."""
        new = text not in self._said
        self._said.add(text)
        return new

    @contextmanager
    def heard(self, name: str) -> Iterator[None]:
        """Within, a logger says nothing that it has said before."""
        logger = logging.getLogger(name)

        def is_new(record: logging.LogRecord) -> bool:
            return self.is_new(record.getMessage())

        logger.addFilter(is_new)
        try:
            yield
        finally:
            logger.removeFilter(is_new)


class Scoring:
    """The measure of a callback, and what it is taken from; arguments as in `PruningCallback`."""

    def __init__(
        self,
        measure: Importance,
        *,
        num_samples: int,
        batches: int | None,
        temperature: float | None,
        bias: Any,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        logits_fn: Callable[[Any, Any], tuple[Tensor, Tensor]] | None,
        seed: int,
    ) -> None:
        self._measure, self._bias, self._temperature = measure, bias, temperature
        self._num_samples, self._num_batches, self._seed = num_samples, batches, seed
        self._loss_fn = None if loss_fn is None else with_true_precision(loss_fn)
        self._logits_fn = None if logits_fn is None else with_true_precision(logits_fn)
        self._logits_known: bool | None = None
        self._once = _Once()

    def batches(self, trainer: pl.Trainer, module: pl.LightningModule, rounds_done: int) -> Iterable[Any]:
        """Training batches of the next round; every time it is gone through they are the same."""
        if self._num_batches is None and not has_length(trainer.train_dataloader):
            raise ValueError("PruningCallback: the training data has no length, so say how many `batches` to score on.")
        self._say_what_is_not_followed(trainer.train_dataloader, "filters are scored")
        return calibration_batches(trainer, module, seed=1000 * self._seed + rounds_done)

    def scores(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        batches: Iterable[Any],
        first: Any,
        graph: ChannelGraph,
        initial: Mapping[str, Tensor] | None,
        rounds_done: int,
    ) -> Scores:
        """Scores by passes over batches, of as many images as were asked for over all ranks; `first` is one of them."""
        options = self.loss_options(module, first)
        if self._num_batches is None:
            options["num_samples"] = math.ceil(self._num_samples / num_ranks(trainer))
        else:
            batches = islice(iter(batches), self._num_batches)
        with without_side_effects(module), self._once.heard("gflow_pl.importance.score"):
            return score_filters(
                module,
                self._measure,
                batches,
                graph=graph,
                initial_state=initial,
                bias=self._bias,
                reduce=mean_over_ranks(trainer),
                seed=self._seed + rounds_done,
                **options,
            )

    def loss_options(self, module: pl.LightningModule, batch: Any) -> dict[str, Any]:
        """What gradients are of: cross-entropy of logits at the measure's temperature, or the module's own loss."""
        if self._uses_logits(module, batch):
            return {"logits_fn": self._logits_fn or default_logits, "temperature": self._temperature}
        return {"loss_fn": self._loss_fn or training_loss}

    def _uses_logits(self, module: pl.LightningModule, batch: Any) -> bool:
        measure = self._measure
        wants = self._temperature is not None or measure.temperature not in (None, 1.0) or measure.needs_labels
        if self._logits_fn is not None or not wants:
            return self._logits_fn is not None and wants
        if self._logits_known is None:
            self._logits_known = self._loss_fn is None and is_classifier(module, batch)
            if not self._logits_known:
                rank_zero_info(
                    f"PruningCallback: {type(module).__name__} gives no (logits, labels), so its loss is taken as it is, without "
                    "a temperature, on batches that are not balanced over classes; a `logits_fn` would change that."
                )
        return self._logits_known

    def loss_and_gradient_norm(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, rounds_done: int
    ) -> list[float]:
        """Both on one batch of each rank, averaged."""
        with without_side_effects(module), isolated_rng(self._seed, rounds_done):
            both = _loss_and_gradient_norm(module, batch, self._loss_fn or training_loss)
        reduce = mean_over_ranks(trainer)
        return (both if reduce is None else reduce(both)).tolist()

    def accuracy(self, trainer: pl.Trainer, module: pl.LightningModule) -> float | str:
        """Share of right answers on the validation data; "" if there is none or the module does not classify."""
        limit = trainer.limit_val_batches
        batches = None if limit == 0 else validation_batches(trainer, module, limit)
        if batches is None:
            return ""
        self._say_what_is_not_followed(trainer.val_dataloaders, "accuracy after a cut is measured")
        rest = iter(batches)
        try:
            start = list(islice(rest, 1))
        except DatasetKeysError:  # the training goes on without a number that it does not need
            start = []
        known = bool(start) and (self._logits_fn is not None or is_classifier(module, start[0]))
        # All ranks go on or none, also those that have no image.
        if not broadcast(trainer, known):
            return ""
        with without_side_effects(module):
            counts = _count_accuracy(module, chain(start, rest), self._logits_fn or default_logits)
        reduce = mean_over_ranks(trainer)
        right, total = (counts if reduce is None else reduce(counts)).tolist()
        return right / total

    def _say_what_is_not_followed(self, loaders: Any, what: str) -> None:
        for name in custom_sampler_names(loaders):
            text = f"PruningCallback: {what} on the whole data set, whatever its sampler {name} leaves out; a Subset would say so."
            if self._once.is_new(text):
                rank_zero_info(text)


def _loss_and_gradient_norm(module: pl.LightningModule, batch: Any, loss_fn: Callable[[Any, Any], Tensor]) -> Tensor:
    """(2,) loss and L2 norm of its gradient on one batch, in evaluation mode; `.grad` is not touched."""
    parameters = [p for p in module.parameters() if p.requires_grad and p.numel()]
    with evaluation_mode(module), torch.enable_grad():
        loss = loss_fn(module, batch)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    squares = [gradient.detach().float().square().sum() for gradient in gradients if gradient is not None]
    norm = torch.stack(squares).sum().sqrt() if squares else loss.new_zeros(())
    return torch.stack([loss.detach().float(), norm.float()])


def _count_accuracy(
    module: pl.LightningModule, batches: Iterable[Any], logits_fn: Callable[[Any, Any], tuple[Tensor, Tensor]]
) -> Tensor:
    """(2,) number of right answers and of examples, in evaluation mode; float64."""
    device = next(module.parameters()).device
    right, total = torch.zeros((), device=device, dtype=torch.float64), 0
    with evaluation_mode(module), torch.no_grad():
        for batch in batches:
            logits, labels = logits_fn(module, batch)
            right += (logits.argmax(dim=1) == labels).sum()
            total += len(labels)
    return torch.stack([right, torch.full_like(right, total)])

"""The loss that scores are taken from: the module's own training step, run without leaving a trace."""

from __future__ import annotations

import functools
import inspect
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from numbers import Number
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from gflow_pl.callbacks.lightning.packages import is_a
from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.importance.gradients import logits_and_labels

__all__ = [
    "classifies",
    "default_logits",
    "first_input",
    "gives_a_loss",
    "in_true_precision",
    "quiet",
    "training_loss",
    "true_precision",
]

_Result = TypeVar("_Result")


@contextmanager
def true_precision(module: pl.LightningModule) -> Iterator[None]:
    """Within, new tensors have the type of the Trainer's "64-true", "16-true" or "bf16-true" precision, as in training."""
    plugin: Any = getattr(getattr(module, "_trainer", None), "precision_plugin", None)
    with plugin.forward_context() if is_a(plugin, "DoublePrecision", "HalfPrecision") else nullcontext():
        yield


def in_true_precision(function: Callable[[Any, Any], _Result]) -> Callable[[Any, Any], _Result]:
    """A function of a module and a batch, run in `true_precision`."""

    @functools.wraps(function)
    def run(module: pl.LightningModule, batch: Any) -> _Result:
        with true_precision(module):
            return function(module, batch)

    return run


@in_true_precision
def training_loss(module: pl.LightningModule, batch: Any) -> Tensor:
    """The scalar loss that the module's `training_step` returns for a batch.

    Raises:
        ValueError: The step returns no loss.
    """
    # As Lightning calls it: the index is left out where the step does not take it.
    arguments = (batch, 0) if _num_arguments(module) > 1 else (batch,)
    try:
        output = module.training_step(*arguments)
    except Exception as error:
        if not module.training:
            error.add_note(
                f"PruningCallback ran `training_step` of {type(module).__name__} in evaluation mode, to score filters: where that "
                "cannot work, give it a `loss_fn(module, batch)` that returns the scalar loss."
            )
        raise
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"`training_step` of {type(module).__name__} returned {type(output).__name__}, expected a loss: "
            "give the PruningCallback a `loss_fn(module, batch)` that returns the scalar loss."
        )
    return loss


def gives_a_loss(module: pl.LightningModule) -> bool:
    """Whether `training_step` can be asked for the loss of a batch: it does not optimize, nor fetch batches, by itself."""
    return module.automatic_optimization and "dataloader_iter" not in inspect.signature(module.training_step).parameters


def _num_arguments(module: pl.LightningModule) -> float:
    parameters = inspect.signature(module.training_step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return float("inf")
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


default_logits = in_true_precision(logits_and_labels)
"""Logits of ``module(batch[0])`` and the labels ``batch[1]``, in the Trainer's precision."""


def first_input(batch: Any) -> Any:
    """What a module's `forward` is called with, for a batch of (inputs, targets) or of inputs alone."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) > 0 else batch


def classifies(module: pl.LightningModule, batch: Any) -> bool:
    """Whether `forward` of a batch's inputs gives logits (examples, classes), and the batch has a label for each."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        return False
    labels = batch[1]
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        return False
    try:
        with evaluation_mode(module), torch.no_grad(), quiet(module), true_precision(module):
            logits = module(batch[0])
    except Exception:  # whatever a foreign forward raises on these inputs: then it gives no logits
        return False
    return isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(labels)


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for whatever logs."""


@contextmanager
def quiet(module: pl.LightningModule) -> Iterator[None]:
    """Within, nothing is logged; afterwards the module's metrics, buffers, lists and counters are what they were."""
    trainer = getattr(module, "_trainer", None)
    loggers = [] if trainer is None else list(trainer.loggers)
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    saved = [(m, _metric_state(m)) for m in metrics]
    kept = [_Kept(m) for m in module.modules() if not isinstance(m, Metric)]
    silenced = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in silenced:
        module.__dict__[name] = _nothing
    if trainer is not None:
        trainer.loggers = [_SilentLogger(logger) for logger in loggers]
    try:
        yield
    finally:
        if trainer is not None:
            trainer.loggers = loggers
        for name, before in silenced.items():
            if before is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before
        for metric, state in saved:
            metric.__dict__.update(state)
        for each in kept:
            each.restore()


class _SilentLogger:
    """Stands in for a logger: takes whatever a training step logs, and is and knows what the logger is and knows."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    __class__: Any = property(lambda self: type(self._logger))  # what `isinstance` asks, too

    @property
    def experiment(self) -> Any:
        """Takes whatever is logged past the logger."""
        return _SilentExperiment(self._logger.experiment)

    def __getattr__(self, name: str) -> Any:
        if name == "_logger":  # of a copy that is only being made
            raise AttributeError(name)
        value = getattr(self._logger, name)
        return _nothing if callable(value) else value


class _SilentExperiment:
    """Takes whatever is done to a logger's experiment, or a part of it; gives the texts, paths and numbers that it holds.

    Args:
        real: The experiment, or its part; None: what a call would have given, which nobody knows.
    """

    def __init__(self, real: Any = None) -> None:
        self._real = real

    __class__: Any = property(lambda self: _SilentExperiment if self._real is None else type(self._real))

    def __getattr__(self, name: str) -> Any:
        if name == "_real" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        value = None if self._real is None else getattr(self._real, name)
        return value if name == "get_logdir" and value is not None else _shown(value)

    def __getitem__(self, key: Any) -> Any:
        try:
            return _shown(self._real[key])
        except (LookupError, TypeError):  # what a step has put there before is not there
            return _SilentExperiment()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __delitem__(self, key: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _SilentExperiment:
        return _SilentExperiment()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> _SilentExperiment:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _shown(value: Any) -> Any:
    """A part of an experiment: itself where nothing can be done to it."""
    return value if isinstance(value, (str, os.PathLike, Number)) else _SilentExperiment(value)


class _Kept:
    """What a training step may change in one module: its buffers, and attributes of the user's own (not what is in those)."""

    _LIGHTNINGS = frozenset(vars(pl.LightningModule()))

    def __init__(self, module: nn.Module) -> None:
        own = {name: value for name, value in vars(module).items() if name not in self._LIGHTNINGS}
        self._places: list[tuple[dict[str, Any], dict[str, Any]]] = [(vars(module), own)]
        self._places.append((module._buffers, dict(module._buffers)))
        values = [value for _, before in self._places for value in before.values()]
        self._contents = [(value, copy(value)) for value in values if isinstance(value, (list, deque, dict, set))]
        self._tensors = [(value, value.detach().clone(), value._version) for value in values if _is_plain(value)]

    def restore(self) -> None:
        for place, before in self._places:
            place.update(before)
        for value, contents in self._contents:
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(contents)
        for tensor, contents, version in self._tensors:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(contents)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with a count of the writes to it."""
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_inference()


def _metric_state(metric: nn.Module) -> dict[str, Any]:
    """A metric's states and counters; lists are copied, tensors cloned, since updates may work in place."""
    state = {}
    for name in (*metric._defaults, "_update_count", "_computed", "_update_called"):  # type: ignore[misc]
        if name in metric.__dict__:
            value = metric.__dict__[name]
            state[name] = (
                value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
            )
    return state

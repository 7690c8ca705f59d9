"""Run a module without side effects: nothing is logged, and its state is restored."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from numbers import Number
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["SideEffects", "without_side_effects"]


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for whatever logs."""


class SideEffects:
    """What running a module has changed in it since this object was made: metrics, buffers, lists and counters.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._metrics = [(m, _metric_state(m)) for m in module.modules() if isinstance(m, Metric)]
        self._modules = [_Kept(m) for m in module.modules() if not isinstance(m, Metric)]

    def undo(self) -> None:
        """Restore the module to its state when this object was made; may be called any number of times."""
        for metric, state in self._metrics:
            metric.__dict__.update({name: _own_copy(value) for name, value in state.items()})
        for each in self._modules:
            each.restore()


@contextmanager
def without_side_effects(module: pl.LightningModule) -> Iterator[SideEffects]:
    """Run a module without logging anything, and undo the side effects on the module at the end of the block.

    Gives the `SideEffects`, which can be undone within the block, too.
    """
    trainer = getattr(module, "_trainer", None)
    loggers = [] if trainer is None else list(trainer.loggers)
    silenced = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in silenced:
        module.__dict__[name] = _nothing
    if trainer is not None:
        trainer.loggers = [_SilentLogger(logger) for logger in loggers]
    effects = SideEffects(module)  # after the above, which undoing must not reverse
    try:
        yield effects
    finally:
        effects.undo()
        if trainer is not None:
            trainer.loggers = loggers
        for name, before in silenced.items():
            if before is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before


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
    """Return a metric's states and counters, as copies: updates may work in place."""
    names = (*metric._defaults, "_update_count", "_computed", "_update_called")  # type: ignore[misc]
    return {name: _own_copy(metric.__dict__[name]) for name in names if name in metric.__dict__}


def _own_copy(value: Any) -> Any:
    """Return a clone of a tensor, a copy of a list, and any other value itself."""
    return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value

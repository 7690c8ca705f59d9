"""Passes over batches without side effects: nothing is logged, and the module's state is restored."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from numbers import Number
from typing import Self

from typing_extensions import override

from gflow_pl.callbacks.lightning.packages import attached_trainer
from gflow_pl.common.lightning_package import pl
from gflow_pl.common.snapshot import module_snapshots
from gflow_pl.common.tensor_values import StoredValues

__all__ = ["SideEffects", "without_side_effects"]

_TENSORS = ("_parameters", "_buffers", "_modules")
_EXCLUDED = frozenset(vars(pl.LightningModule())) - set(_TENSORS)
"""Attributes that Lightning and PyTorch manage (hooks, the Trainer): these passes do not change them."""
_MAX_ITEMS = 4096


class SideEffects:
    """What running a module has changed in it since this object was created, to be undone.

    Scoring runs the user's `training_step` on batches that are not trained on. Such a step may update metrics and
    running statistics, append to lists, count its calls or update parameters by hand (those of a teacher). `undo`
    restores the parameters, buffers, metrics and attributes of the module and its submodules, and the items of lists,
    dicts, sets and deques among them. What else the module holds, in a list or in an object of the user's own (a hidden
    teacher, averaged weights), is restored as well, unless it is a data set or a long container.

    Args:
        module: The module.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._snapshots = module_snapshots(module, exclude=_EXCLUDED, max_items=_MAX_ITEMS)
        parameters = list(module.parameters())
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        self._values = StoredValues([*parameters, *(x for snapshot in self._snapshots for x in snapshot.tensors)])

    def undo(self) -> None:
        """Restore the module to its state when this object was created; may be called any number of times."""
        for snapshot in self._snapshots:
            snapshot.restore()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._values.restore()


@contextmanager
def without_side_effects(module: pl.LightningModule) -> Iterator[SideEffects]:
    """Disable logging for the time of the block, and undo the side effects on the module at its end.

    Yields:
        The side effects, which can be undone inside the block, too: between two passes that must not affect each other.
    """
    # Disable the module's `log` methods: attributes of the instance hide them.
    own_attributes: dict[str, object] = {
        name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)
    }
    vars(module).update(log=_ignore, log_dict=_ignore)
    # Replace the loggers.
    trainer = attached_trainer(module)
    loggers = [] if trainer is None else list(trainer.loggers)
    if trainer is not None:
        trainer.loggers = [_silent_copy(logger) for logger in loggers]

    effects = SideEffects(module)  # created now, so that undoing does not enable logging
    try:
        yield effects
    finally:
        effects.undo()
        if trainer is not None:
            trainer.loggers = loggers
        for name in ("log", "log_dict"):
            del vars(module)[name]
        vars(module).update(own_attributes)


def _ignore(*_: object, **__: object) -> None:
    """Accept any call and do nothing."""


def _silent_copy(logger: pl.loggers.logger.Logger) -> pl.loggers.logger.Logger:
    """Return a shallow copy of a logger whose public methods do nothing.

    Its class is a subclass of the logger's class, since `Trainer.log_dir` and many training steps test the kind of a
    logger with `isinstance`. Its attributes and properties (`log_dir`, `save_dir`, `version`, ...) are those of the
    logger.
    """
    cls = type(logger)
    methods = [name for name in dir(cls) if not name.startswith("_") and callable(getattr(cls, name))]
    experiment = property(lambda _: _SilentExperiment(getattr(logger, "experiment", None)))
    silent_class = type(cls.__name__, (cls,), {**dict.fromkeys(methods, _ignore), "experiment": experiment})
    silent: pl.loggers.logger.Logger = object.__new__(silent_class)
    vars(silent).update(vars(logger))
    return silent


class _SilentExperiment(pl.loggers.logger.DummyExperiment):
    """Lightning's dummy experiment, through which texts, paths and numbers of the real experiment can be read.

    Any part of it accepts calls and assignments, and does nothing.

    Args:
        real: The experiment or a part of it; None for the result of a call, of which nothing is known.
    """

    def __init__(self, real: object = None) -> None:
        self._real = real

    @override
    def __getattr__(self, name: str) -> object:  # type: ignore[override]
        if name.startswith("_"):
            raise AttributeError(name)
        value = None if self._real is None else getattr(self._real, name)
        # The folder of TensorBoard's writer is read by a method.
        return value if name == "get_logdir" and value is not None else self._readable(value)

    @override
    def __getitem__(self, key: Hashable) -> object:  # type: ignore[override]
        try:
            return self._readable(self._real[key])  # type: ignore[index]
        except (LookupError, TypeError):  # assigned before, and ignored
            return _SilentExperiment()

    def __call__(self, *_: object, **__: object) -> _SilentExperiment:
        return _SilentExperiment()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @staticmethod
    def _readable(value: object) -> object:
        """Return a text, path or number as it is, and anything else behind a silent experiment."""
        return value if isinstance(value, (str, os.PathLike, Number)) else _SilentExperiment(value)

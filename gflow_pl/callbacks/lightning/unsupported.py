"""Trainer configurations that a rewrite of the network during training does not support."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, StochasticWeightAveraging
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from gflow_pl.callbacks.lightning.packages import both_packages, callbacks_of

__all__ = ["check_supported"]


def check_supported(trainer: pl.Trainer, callback: Callback, only_one: type[Callback]) -> None:
    """Raise if pruning would fail later in training or, worse, give wrong results silently.

    Args:
        trainer: The Trainer.
        callback: The callback that prunes.
        only_one: The class of which the Trainer may hold one instance, `callback`.

    Raises:
        MisconfigurationException: The strategy, the launcher or another callback of the Trainer is not supported.
    """
    problem = (
        _problem_of_strategy(trainer)
        or _problem_of_launcher(trainer)
        or _problem_of_callbacks(trainer, callback, only_one)
    )
    if problem is not None:
        raise MisconfigurationException(f"{type(callback).__name__}: {problem}")


def _problem_of_strategy(trainer: pl.Trainer) -> str | None:
    strategy = trainer.strategy
    name = type(strategy).__name__
    shards = isinstance(strategy, both_packages(FSDPStrategy, DeepSpeedStrategy))
    if shards or getattr(strategy, "restore_checkpoint_after_setup", False):
        return f"{name} shards parameters, which cannot be rewritten: use strategy='ddp' or a single device."
    if not isinstance(strategy, both_packages(DDPStrategy, SingleDeviceStrategy)):
        return f"{name} is not supported: use strategy='ddp' or a single device."
    return None


def _problem_of_launcher(trainer: pl.Trainer) -> str | None:
    launcher = getattr(trainer.strategy, "launcher", None)
    if hasattr(launcher, "_start_method"):
        return (
            "with spawned or forked processes the main process would load the pruned weights into the full-size module: "
            "use strategy='ddp'."
        )
    return None


def _problem_of_callbacks(trainer: pl.Trainer, callback: Callback, only_one: type[Callback]) -> str | None:
    if callbacks_of(trainer, StochasticWeightAveraging):
        return (
            "StochasticWeightAveraging keeps a full-size copy that cannot follow: use WeightAveraging or "
            "EMAWeightAveraging, which are pruned alike."
        )
    if any(other is not callback for other in callbacks_of(trainer, only_one)):
        return "there are two of these callbacks in the Trainer: keep one; it cuts several rounds by itself (`rounds`)."
    return None

"""Trainer configurations that a rewrite of the network during training does not support."""

from __future__ import annotations

from gflow_pl.callbacks.lightning.packages import both_packages, callbacks_of, private_attribute
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import pl

__all__ = ["UnsupportedTrainerError", "check_supported"]


class UnsupportedTrainerError(SettingsError, pl.utilities.exceptions.MisconfigurationException):
    """A strategy, launcher or callback that pruning cannot be combined with."""


def check_supported(
    trainer: pl.Trainer, callback: pl.callbacks.Callback, only_one: type[pl.callbacks.Callback]
) -> None:
    """Raise if pruning would fail later in training or, worse, give wrong results silently.

    Args:
        trainer: The Trainer.
        callback: The callback that prunes.
        only_one: The class of which the Trainer may hold one instance, `callback`.

    Raises:
        UnsupportedTrainerError: The strategy, the launcher or another callback of the Trainer is not supported.
    """
    problem = _strategy_problem(trainer) or _launcher_problem(trainer) or _callback_problem(trainer, callback, only_one)
    if problem is not None:
        raise UnsupportedTrainerError(f"{type(callback).__name__}: {problem}")


def _strategy_problem(trainer: pl.Trainer) -> str | None:
    """Return why the strategy is not supported; None if it is."""
    strategy = trainer.strategy
    name = type(strategy).__name__
    shards_parameters = isinstance(strategy, both_packages(pl.strategies.FSDPStrategy, pl.strategies.DeepSpeedStrategy))
    # Other strategies that shard, such as ModelParallelStrategy, have this attribute set as well.
    if shards_parameters or getattr(strategy, "restore_checkpoint_after_setup", False):
        return f"{name} shards parameters, which cannot be rewritten: use strategy='ddp' or a single device."
    if not isinstance(strategy, both_packages(pl.strategies.DDPStrategy, pl.strategies.SingleDeviceStrategy)):
        return f"{name} is not supported: use strategy='ddp' or a single device."
    return None


def _launcher_problem(trainer: pl.Trainer) -> str | None:
    """Return why the way in which processes are started is not supported; None if it is."""
    if not isinstance(trainer.strategy, both_packages(pl.strategies.DDPStrategy)):
        return None
    # Private: "popen", "spawn", "fork" or "forkserver". Without it a spawned run would be accepted and would fail at
    # its end, when the main process loads the pruned weights into its module of full size.
    start_method = private_attribute(trainer.strategy, "_start_method", "find out how processes are started")
    if start_method == "popen":
        return None
    return (
        "with spawned or forked processes the main process would load the pruned weights into a module of full size: "
        "use strategy='ddp'."
    )


def _callback_problem(
    trainer: pl.Trainer, callback: pl.callbacks.Callback, only_one: type[pl.callbacks.Callback]
) -> str | None:
    """Return why another callback of the Trainer is not supported; None if all are."""
    if callbacks_of(trainer, pl.callbacks.StochasticWeightAveraging):
        return (
            "StochasticWeightAveraging keeps a copy of full size that cannot be pruned: use WeightAveraging or "
            "EMAWeightAveraging, whose copies are pruned with the module."
        )
    for other in callbacks_of(trainer, pl.callbacks.ModelPruning):
        # Private: whether it puts the initial weights back, in full size. Without it, training would fail after a cut.
        if getattr(other, "_use_lottery_ticket_hypothesis", True):
            return (
                "ModelPruning puts the initial weights back in full size: give it use_lottery_ticket_hypothesis=False "
                "(its masks are then cut along with the weights)."
            )
    if any(other is not callback for other in callbacks_of(trainer, only_one)):
        return "there are two of these callbacks in the Trainer: keep one, which can cut several rounds (`rounds`)."
    return None

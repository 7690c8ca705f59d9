"""What a physical rewrite inside training cannot be combined with, and what to do instead."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from gflow_pl.callbacks.lightning.packages import callbacks_of, is_a

__all__ = ["refuse_what_cannot_work"]


def refuse_what_cannot_work(trainer: pl.Trainer, callback: Any) -> None:
    """Raise one sentence for a set-up in which pruning would fail later or, worse, go wrong silently.

    Raises:
        MisconfigurationException: The strategy, launcher or another callback cannot be served.
    """
    for problem in _problems(trainer, callback):
        raise MisconfigurationException(f"{type(callback).__name__}: {problem}")


def _problems(trainer: pl.Trainer, callback: Any) -> list[str]:
    strategy: Any = trainer.strategy
    others = [c for c in callbacks_of(trainer) if is_a(c, "PruningCallback") and c is not callback]
    problems = []
    if is_a(strategy, "FSDPStrategy", "DeepSpeedStrategy") or getattr(
        strategy, "restore_checkpoint_after_setup", False
    ):
        problems.append(
            f"{type(strategy).__name__} shards parameters, which cannot be rewritten: use strategy='ddp' or a single device."
        )
    elif not is_a(strategy, "DDPStrategy", "SingleDeviceStrategy"):
        problems.append(f"{type(strategy).__name__} is not supported: use strategy='ddp' or a single device.")
    launcher = getattr(strategy, "launcher", None)
    if hasattr(launcher, "_start_method"):
        problems.append(
            "with spawned or forked processes the main process would load the pruned weights into the full-size module: "
            "use strategy='ddp'."
        )
    if any(is_a(c, "StochasticWeightAveraging") for c in callbacks_of(trainer)):
        problems.append(
            "StochasticWeightAveraging keeps a full-size copy that cannot follow: use WeightAveraging or "
            "EMAWeightAveraging, which are pruned alike."
        )
    if others:
        problems.append(
            "there are two of these callbacks in the Trainer: keep one; it cuts several rounds by itself (`rounds`)."
        )
    return problems

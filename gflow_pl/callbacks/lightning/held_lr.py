"""A learning rate held for a while, without the module's own schedule noticing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["HeldLearningRate"]


class HeldLearningRate:
    """While `is_held` says so, every optimizer steps with `lr`; its own rates are back in place after each step.

    Schedulers read and write the rates between steps, so they never see the held one; nothing of it is in a checkpoint.

    Args:
        lr: The rate to hold, > 0.
        optimizers: The torch optimizers.
        is_held: Whether to hold the rate at this moment.
    """

    def __init__(self, lr: float, optimizers: Iterable[Optimizer], is_held: Callable[[], bool]) -> None:
        self._lr, self._is_held, self._optimizers = lr, is_held, list(optimizers)
        self._own: dict[int, list[Any]] = {}
        self._handles: list[RemovableHandle] = []
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def remove(self) -> None:
        """Let go for good, also in the middle of a step that has failed."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self._optimizers:
            self._after_step(optimizer)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_held():
            self._own[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = self._lr

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self._own.pop(id(optimizer), []), strict=False):
            group["lr"] = lr

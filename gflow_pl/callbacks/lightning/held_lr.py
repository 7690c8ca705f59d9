"""A learning rate that is held for a while, without the schedulers noticing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["HeldLearningRate"]


class HeldLearningRate:
    """Step hooks that make optimizers step with a held learning rate while a condition is true.

    The optimizers' own learning rates are replaced just before a step and restored just after it. Schedulers read and
    write them between steps, so that they never see the held one, and no checkpoint contains it.

    Args:
        lr: The held learning rate, > 0.
        optimizers: The torch optimizers.
        is_held: Called before every step; returns whether the learning rate is held in this step.
    """

    def __init__(self, lr: float, optimizers: Iterable[Optimizer], is_held: Callable[[], bool]) -> None:
        self._lr, self._is_held, self._optimizers = lr, is_held, list(optimizers)
        self._own_rates: dict[int, list[float]] = {}  # of an optimizer inside its step, by id; one per parameter group
        self._handles: list[RemovableHandle] = []
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def remove(self) -> None:
        """Remove the hooks on the optimizers, and restore the learning rates if a step has failed half-way."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self._optimizers:
            self._after_step(optimizer)

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        """Save the optimizer's learning rates and set the held one."""
        if self._is_held():
            self._own_rates[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = self._lr

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        """Restore the learning rates that were saved before the step, if any."""
        for group, lr in zip(optimizer.param_groups, self._own_rates.pop(id(optimizer), []), strict=False):
            group["lr"] = lr

"""The torch optimizer inside a wrapper."""

from __future__ import annotations

from typing import Protocol

from torch.optim import Optimizer

__all__ = ["OptimizerLike", "OptimizerWrapper", "unwrap_optimizer"]


class OptimizerWrapper(Protocol):
    """An object that holds a torch optimizer, such as the wrappers of mixed-precision libraries."""

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""


OptimizerLike = Optimizer | OptimizerWrapper
"""A torch optimizer, or a wrapper that holds one as ``.optimizer``."""


def unwrap_optimizer(optimizer: OptimizerLike) -> Optimizer:
    """Return the torch optimizer whose state and attributes training uses.

    Some wrappers pass for an optimizer themselves: the ``LightningOptimizer`` of ``module.optimizers()`` is an instance
    of the wrapped class and forwards what is read, but an attribute that is set on it does not reach the wrapped
    optimizer. Such a wrapper shares its state with the optimizer inside. An optimizer that holds another one and keeps
    state of its own (Lookahead, for example) is no wrapper and is returned as it is.

    Args:
        optimizer: A torch optimizer, or a wrapper that holds one as ``.optimizer``.
    """
    inner = getattr(optimizer, "optimizer", None)
    if not isinstance(optimizer, Optimizer):
        return optimizer.optimizer
    return inner if isinstance(inner, Optimizer) and inner.state is optimizer.state else optimizer

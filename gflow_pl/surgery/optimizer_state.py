"""The state of optimizers, cut like the parameters that it belongs to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gflow_pl.common.errors import SettingsError
from gflow_pl.common.optimizers import OptimizerLike, unwrap_optimizer
from gflow_pl.surgery.tensor_table import Cut, cut_tensor

__all__ = ["check_optimizers", "cut_state", "drop_state"]


def cut_state(optimizers: Iterable[OptimizerLike], cuts: Mapping[Tensor, Sequence[Cut]]) -> list[Callable[[], None]]:
    """Computes the state that optimizers need after a cut, and returns what puts it in place.

    A state tensor of the parameter's number of dims is cut along every dim in which it has the parameter's size and
    left alone where it has size 1 (factored second moments); numbers stay. Where an entry has another form, all state of
    that parameter is dropped with a warning and the optimizer starts it anew.

    Args:
        optimizers: torch optimizers, or wrappers that hold one as ``.optimizer``.
        cuts: Parameter, in its old shape, to what stays of it.

    Returns:
        Calls that change the optimizers; they cannot fail.

    Raises:
        ValueError: An optimizer's state cannot be cut (LBFGS, sharded ones).
    """
    commits: list[Callable[[], None]] = []
    for optimizer in map(unwrap_optimizer, optimizers):
        ours = [p for group in optimizer.param_groups for p in group["params"] if p in cuts]
        if not ours:
            continue
        check_optimizers([optimizer], keep_state=bool(optimizer.state))
        if hasattr(optimizer, "_numel_cache"):
            commits.append(lambda optimizer=optimizer: setattr(optimizer, "_numel_cache", None))  # type: ignore[misc]
        for parameter in ours:
            if parameter in optimizer.state:
                commits.append(_cut_one(optimizer, parameter, cuts[parameter]))
    return commits


def _cut_one(optimizer: Optimizer, parameter: Tensor, cuts: Sequence[Cut]) -> Callable[[], None]:
    state = optimizer.state[parameter]
    new: dict[Any, Any] = {}
    for key, entry in state.items():
        value = _cut_entry(entry, parameter.shape, cuts)
        if value is None and entry is not None:
            kind = f"shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else f"type {type(entry).__name__}"
            warnings.warn(
                f"{type(optimizer).__name__} starts anew for a parameter of shape {tuple(parameter.shape)}: its state "
                f"'{key}' has {kind}, which cannot be cut with it.",
                stacklevel=4,
            )
            return lambda: optimizer.state.pop(parameter, None) and None
        new[key] = value
    return lambda: state.update(new)


def _cut_entry(entry: Any, shape: torch.Size, cuts: Sequence[Cut]) -> Any:
    """The entry after the cut; None if it cannot be cut."""
    if not isinstance(entry, Tensor):
        holds_tensors = isinstance(entry, (list, tuple, dict, set)) and len(entry) > 0
        return None if holds_tensors else entry
    if entry.ndim == 0:
        return entry
    if entry.ndim != len(shape) or any(entry.shape[cut.dim] not in (1, shape[cut.dim]) for cut in cuts):
        return None
    # Where the parameter itself has size 1 along the dim, size 1 means "that position".
    return cut_tensor(entry, [cut for cut in cuts if entry.shape[cut.dim] == shape[cut.dim]])


def drop_state(optimizers: Iterable[OptimizerLike]) -> None:
    """Throws away what optimizers have gathered (momentum, second moments, step counts), as if they were new.

    Their groups, and so learning rates and schedulers, stay as they are.

    Args:
        optimizers: torch optimizers, or wrappers that hold one as ``.optimizer``.
    """
    for optimizer in map(unwrap_optimizer, optimizers):
        optimizer.state.clear()
        if hasattr(optimizer, "_numel_cache"):
            optimizer._numel_cache = None
        if isinstance(optimizer, torch.optim.Adagrad):
            # The one that makes its state when it is built; not every torch can step without.
            groups = [dict(group) for group in optimizer.param_groups]
            start = optimizer.defaults["initial_accumulator_value"]
            optimizer.state.update(torch.optim.Adagrad(groups, initial_accumulator_value=start).state)
        if isinstance(optimizer, torch.optim.SGD):
            _start_fused_momentum(optimizer)


def _start_fused_momentum(optimizer: torch.optim.SGD) -> None:
    """Momentum of zeros, which leads to the same steps as none.

    torch makes the missing momentum of a fused SGD without contents, and where a gradient scaler then skips the step, for
    an overflow, it goes on with whatever lay in that memory.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group["momentum"] != 0 and group["dampening"] == 0:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def check_optimizers(
    optimizers: Iterable[OptimizerLike],
    *,
    keep_state: bool,
    remedy: str = "drop its state with `drop_state` before the cut",
) -> None:
    """Raise if the state of an optimizer cannot be cut together with its parameters.

    Args:
        optimizers: torch optimizers, or wrappers that hold one as ``.optimizer``.
        keep_state: Whether the state must survive the cut. An optimizer whose state can be dropped is then accepted if not.
        remedy: How the caller can have the state dropped, for the message.

    Raises:
        SettingsError: An optimizer spreads its state over the ranks, or `keep_state` is true and an optimizer has a state that
            is not kept by parameter.
    """
    for optimizer in map(unwrap_optimizer, optimizers):
        name = type(optimizer).__name__
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise SettingsError(
                f"{name} spreads its state over the ranks, which cannot be pruned: use another optimizer."
            )
        if keep_state and isinstance(optimizer, torch.optim.LBFGS):
            raise SettingsError(
                f"{name} keeps the state of all parameters in one flat vector, which cannot be cut along with them: "
                f"{remedy}, or use another optimizer."
            )

"""The state of optimizers: cut together with the parameters that it belongs to, or dropped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gflow_pl.common.errors import SettingsError
from gflow_pl.common.optimizers import OptimizerLike, unwrap_optimizer
from gflow_pl.surgery.tensor_table import Cut, cut_tensor

__all__ = ["StateRule", "check_optimizers", "cut_state", "drop_empty_parameters", "drop_state", "register_state_rule"]

StateRule = Callable[[Mapping[str, Any], Tensor, Sequence[Cut]], Mapping[str, Any]]
"""Function ``rule(state, parameter, cuts)`` that returns the entries of the parameter's state that change in a cut."""

_STATE_RULES: dict[type[Optimizer], StateRule] = {}

_CANNOT_BE_CUT = object()
"""Result of `_cut_entry` for an entry that cannot be cut; None is a valid entry."""


def register_state_rule(optimizer: type[Optimizer], rule: StateRule) -> None:
    """Define how the state of an optimizer is cut, for one whose state tensors do not have the shape of the parameter.

    Args:
        optimizer: Optimizer class. The rule holds for its subclasses, too.
        rule: Called as ``rule(state, parameter, cuts)`` for every parameter that is cut, before anything is assigned:
            `state` is ``optimizer.state[parameter]``, the parameter has its old shape, and `cuts` are the positions
            that stay. It returns the new value of every entry that changes and must not change its arguments.

    Example:
        >>> from gflow_pl.surgery import cut_tensor
        >>> class FlatSGD(torch.optim.SGD):
        ...     "Keeps a running average of the gradient as a flat vector."
        >>> def cut_flat(state, parameter, cuts):
        ...     return {"average": cut_tensor(state["average"].view_as(parameter), cuts).flatten()}
        >>> register_state_rule(FlatSGD, cut_flat)
    """
    _STATE_RULES[optimizer] = rule


def check_optimizers(
    optimizers: Iterable[OptimizerLike],
    *,
    keep_state: bool,
    remedy: str = "drop its state with `drop_state` before the cut",
) -> None:
    """Raise if the state of an optimizer cannot be cut together with its parameters.

    Args:
        optimizers: torch optimizers, or wrappers that hold one as ``.optimizer``.
        keep_state: Whether the state must survive the cut. If not, an optimizer whose state can be dropped is accepted.
        remedy: How the user can have the state dropped, for the message.

    Raises:
        SettingsError: An optimizer distributes its state over the ranks, or `keep_state` is true and an optimizer does
            not store its state by parameter.
    """
    for optimizer in map(unwrap_optimizer, optimizers):
        name = type(optimizer).__name__
        # By name: the class is missing where torch was built without distributed support.
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise SettingsError(
                f"The state of {name} is spread over ranks and cannot be pruned: use another optimizer."
            )
        if keep_state and isinstance(optimizer, torch.optim.LBFGS):
            raise SettingsError(
                f"{name} stores the state of all parameters in one flat vector, which cannot be cut together with "
                f"them: {remedy}, or use another optimizer."
            )


def cut_state(optimizers: Iterable[OptimizerLike], cuts: Mapping[Tensor, Sequence[Cut]]) -> list[Callable[[], None]]:
    """Compute the state that optimizers need after a cut, and return the calls that assign it.

    A state tensor with as many dims as the parameter is cut along every dim in which it has the parameter's size. A dim
    of size 1 is left as it is (factored second moments, as in Adafactor). Numbers stay. If an entry has any other form,
    the whole state of that parameter is dropped with a warning, and the optimizer starts anew for it. A rule that is
    registered for the optimizer (`register_state_rule`) replaces all this.

    Args:
        optimizers: torch optimizers, or wrappers that hold one as ``.optimizer``.
        cuts: Parameter, in its old shape, to the positions that stay.

    Returns:
        Calls that change the optimizers. They cannot fail.

    Raises:
        SettingsError: The state of an optimizer cannot be cut (see `check_optimizers`).
    """
    commits: list[Callable[[], None]] = []
    for optimizer in map(unwrap_optimizer, optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p in cuts]
        if not parameters:
            continue
        check_optimizers([optimizer], keep_state=bool(optimizer.state))
        if hasattr(optimizer, "_numel_cache"):  # LBFGS: number of elements in all parameters
            commits.append(partial(setattr, optimizer, "_numel_cache", None))
        for parameter in parameters:
            if parameter in optimizer.state:
                commits.append(_cut_state_of(optimizer, parameter, cuts[parameter]))
    return commits


def _cut_state_of(optimizer: Optimizer, parameter: Tensor, cuts: Sequence[Cut]) -> Callable[[], None]:
    """Compute the state of one parameter after a cut, and return the call that assigns it."""
    state = optimizer.state[parameter]
    rule = next((_STATE_RULES[kind] for kind in type(optimizer).__mro__ if kind in _STATE_RULES), None)
    if rule is not None:
        return partial(state.update, rule(state, parameter, cuts))
    new: dict[Any, Any] = {}
    for key, entry in state.items():
        value = _cut_entry(entry, parameter.shape, cuts)
        if value is _CANNOT_BE_CUT:
            kind = f"shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else f"type {type(entry).__name__}"
            warnings.warn(
                f"{type(optimizer).__name__} starts anew for a parameter of shape {tuple(parameter.shape)}: its state "
                f"'{key}' has {kind}, which cannot be cut with it.",
                stacklevel=4,
            )
            return lambda: optimizer.state.pop(parameter, None) and None
        new[key] = value
    return partial(state.update, new)


def _cut_entry(entry: object, shape: torch.Size, cuts: Sequence[Cut]) -> object:
    """Return an entry of a parameter's state after a cut, or `_CANNOT_BE_CUT`.

    Args:
        entry: A tensor, or any other value that an optimizer stores.
        shape: Shape of the parameter before the cut.
        cuts: The positions of the parameter that stay.
    """
    if not isinstance(entry, Tensor):
        may_hold_tensors = isinstance(entry, (list, tuple, dict, set)) and len(entry) > 0
        return _CANNOT_BE_CUT if may_hold_tensors else entry
    if entry.ndim == 0:
        return entry
    if entry.ndim != len(shape) or any(entry.shape[cut.dim] not in (1, shape[cut.dim]) for cut in cuts):
        return _CANNOT_BE_CUT
    # If the parameter itself has size 1 along a dim, an entry of size 1 is cut like any other.
    return cut_tensor(entry, [cut for cut in cuts if entry.shape[cut.dim] == shape[cut.dim]])


def drop_state(optimizers: Iterable[OptimizerLike]) -> None:
    """Reset the state of optimizers (momentum, second moments, step counts) to that of new ones.

    Their parameter groups stay, and with them learning rates and schedulers.

    Args:
        optimizers: torch optimizers, or wrappers that hold one as ``.optimizer``.
    """
    for optimizer in map(unwrap_optimizer, optimizers):
        optimizer.state.clear()
        if hasattr(optimizer, "_numel_cache"):  # LBFGS: number of elements in all parameters
            optimizer._numel_cache = None
        if isinstance(optimizer, torch.optim.Adagrad):
            # Adagrad creates its state in the constructor, and some versions of torch cannot step without it.
            groups = [dict(group) for group in optimizer.param_groups]
            start = optimizer.defaults["initial_accumulator_value"]
            optimizer.state.update(torch.optim.Adagrad(groups, initial_accumulator_value=start).state)
        if isinstance(optimizer, torch.optim.SGD):
            _initialize_fused_momentum(optimizer)


def _initialize_fused_momentum(optimizer: torch.optim.SGD) -> None:
    """Set the momentum of a fused SGD to zeros, which leads to the same steps as no momentum.

    The fused kernel allocates a missing momentum without initializing it. If a gradient scaler then skips the step
    because of an overflow, the next step would use the uninitialized memory.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group["momentum"] != 0 and group["dampening"] == 0:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def drop_empty_parameters(optimizers: Iterable[OptimizerLike]) -> None:
    """Remove parameters without elements from optimizers. Their parameter groups stay.

    `rewrite` does this for the optimizers that it is given. An optimizer that is built for a network with emptied
    layers needs it before it loads a saved state, in which such parameters do not occur.

    Args:
        optimizers: torch optimizers, or wrappers that hold one as ``.optimizer``.
    """
    for optimizer in map(unwrap_optimizer, optimizers):
        for group in optimizer.param_groups:
            for parameter in [p for p in group["params"] if p.numel() == 0]:
                optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if p.numel() > 0]

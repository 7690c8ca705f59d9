"""Try out the functions of a module that a trace will record: which modules they run, and what they train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gflow_pl.callbacks.lightning.packages import attached_trainer
from gflow_pl.callbacks.lightning.precision import true_precision
from gflow_pl.callbacks.lightning.silence import SideEffects
from gflow_pl.callbacks.lightning.training_loss import run_training_step
from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.common.lightning_package import pl
from gflow_pl.common.nested import copy_nested, iter_tensors

__all__ = ["Trial", "step_of_training", "try_call"]


@dataclass(frozen=True, eq=False)
class Trial:
    """What one call of a function showed.

    Attributes:
        error: What the function has raised; None if it has run to its end.
        modules: Names of the modules that it has run.
        trained: Names of the parameters that got a gradient from a loss; None if that is not known.
        changed: Names of the parameters that it has written to.
    """

    error: Exception | None
    modules: frozenset[str]
    trained: frozenset[str] | None
    changed: frozenset[str]


def step_of_training(module: pl.LightningModule) -> Callable[[Any], Any]:
    """Return a function of a batch that runs `training_step` without its effects on the training.

    Under manual optimization the step calls optimizers, which do nothing here, and its backward passes are left out.
    """

    def step(batch: Any) -> Any:
        losses: list[Tensor] = []
        with true_precision(module), nullcontext() if automatic else _idle_optimization(module, losses):
            output = run_training_step(module, batch)
        return losses, output

    automatic = module.automatic_optimization

    return step


def try_call(
    module: pl.LightningModule,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    effects: SideEffects | None,
    *,
    training: bool,
) -> Trial:
    """Call a function on real tensors, and undo what it changes in the module.

    Args:
        module: The module.
        function: The function, which runs the module.
        arguments: Its positional arguments.
        effects: The side effects to undo; None if the caller undoes them.
        training: Whether the module is as in training, and gradients of the result are computed; otherwise it is in
            evaluation mode.
    """
    arguments = copy_nested(arguments, Tensor.clone)  # a step may change its batch
    names = {id(part): name for name, part in module.named_modules()}
    parameters = dict(module.named_parameters())
    before = {name: (p._version, p.detach().clone()) for name, p in parameters.items()} if training else {}
    called: set[str] = set()
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda part, args: called.add(names[id(part)]) if id(part) in names else None
    )
    trained: frozenset[str] | None = None
    error: Exception | None = None
    changed: set[str] = set()
    try:
        if training:
            # Compiled code would be compiled again for the size of this batch.
            with torch.compiler.set_stance("force_eager"), torch.enable_grad():
                output = function(*arguments)
                changed = {name for name, p in parameters.items() if _is_written(p, *before[name])}
                trained = _trained(output, parameters)
        else:
            with torch.compiler.set_stance("force_eager"), evaluation_mode(module), torch.no_grad():
                function(*arguments)
    except Exception as raised:  # the module's own code may raise anything
        error = raised.with_traceback(None)  # whose frames would keep the graph of the gradients alive
    finally:
        hook.remove()
        if effects is not None:
            effects.undo()
    return Trial(error, frozenset(called), trained, frozenset(changed))


def _is_written(parameter: Tensor, version: int, values: Tensor) -> bool:
    """Return whether a parameter has been written to, also if its values have not changed."""
    if parameter._version != version or parameter.shape != values.shape:
        return True
    return not torch.equal(parameter.detach(), values)


def _trained(output: object, parameters: Mapping[str, Tensor]) -> frozenset[str] | None:
    """Return the names of the parameters that any result depends on; None if no result depends on parameters."""
    results = [x.sum() for x in iter_tensors(output) if x.requires_grad and x.is_floating_point()]
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    if not results or not wanted:
        return None
    gradients = torch.autograd.grad(results, [*wanted.values()], allow_unused=True)
    return frozenset(name for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None)


class _Idle:
    """An optimizer or scheduler whose attributes can be read, and whose methods do nothing."""

    def __init__(self, real: object) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        return value if not callable(value) else _nothing

    def step(self, closure: Callable[[], object] | None = None, **_: object) -> object:
        """Run the closure, if there is one, and change nothing."""
        return None if closure is None else closure()

    @contextmanager
    def toggle_model(self, **_: object) -> Iterator[None]:
        """Leave all parameters as they are."""
        yield


def _nothing(*_: object, **__: object) -> None:
    """Accept any call and do nothing."""


@contextmanager
def _idle_optimization(module: pl.LightningModule, losses: list[Tensor]) -> Iterator[None]:
    """Let optimizers and backward passes of a module do nothing for the time of a block, and collect the losses."""

    def backward(loss: Tensor, *_: object, **__: object) -> None:
        losses.append(loss)

    def idle(read: Callable[..., Any]) -> Callable[..., Any]:
        def get(*args: Any, **kwargs: Any) -> Any:
            found = read(*args, **kwargs)
            return [_Idle(one) for one in found] if isinstance(found, list) else found and _Idle(found)

        return get

    replaced: dict[str, object] = {
        **dict.fromkeys(("toggle_optimizer", "untoggle_optimizer", "clip_gradients"), _nothing),
        "manual_backward": backward,
    }
    if attached_trainer(module) is not None:
        replaced |= {name: idle(getattr(module, name)) for name in ("optimizers", "lr_schedulers")}
    own = {name: vars(module)[name] for name in replaced if name in vars(module)}
    of_tensors = Tensor.backward
    vars(module).update(replaced)
    Tensor.backward = backward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Tensor.backward = of_tensors  # type: ignore[method-assign]
        for name in replaced:
            vars(module).pop(name, None)
        vars(module).update(own)

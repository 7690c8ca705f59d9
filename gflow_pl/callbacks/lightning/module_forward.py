"""Trace a LightningModule through its training step and its `forward`, and find out whether it is compiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gflow_pl.callbacks.lightning.further_calls import further_calls
from gflow_pl.callbacks.lightning.network_copies import CopyWatch, Training, frozen_outside
from gflow_pl.callbacks.lightning.packages import attached_trainer, both_packages
from gflow_pl.callbacks.lightning.precision import true_precision
from gflow_pl.callbacks.lightning.rehearsal import without_needed_groups
from gflow_pl.callbacks.lightning.silence import SideEffects
from gflow_pl.callbacks.lightning.step_trial import Trial, step_of_training, try_call
from gflow_pl.callbacks.lightning.training_loss import batch_inputs
from gflow_pl.channels import Call, CallError, keywords_of, trace_calls
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.lightning_package import fabric, pl
from gflow_pl.importance.batches import first_examples
from gflow_pl.values import ChannelGraph
from gflow_pl.values.choices import Residual

__all__ = ["is_compiled", "trace_module", "training_of"]

_MAX_EXAMPLES = 32
"""A larger batch is cut to this number of examples if it can be: a forward that looks at values is run many times."""


@dataclass(frozen=True, eq=False)
class _Forward:
    """A function that runs a module in evaluation mode, with its arguments.

    Attributes:
        function: The function.
        arguments: Its positional arguments.
        modules: Names of the modules that it runs.
        is_loss: Whether it computes the loss, because `forward` takes no part of a batch.
    """

    function: Callable[..., object]
    arguments: tuple[object, ...]
    modules: frozenset[str]
    is_loss: bool


def trace_module(
    module: pl.LightningModule,
    batch: object,
    loss_fn: Callable[[pl.LightningModule, Any], Tensor],
    effects: SideEffects,
    watch: CopyWatch,
    *,
    residual: Residual = "expand",
    exact_only: bool = False,
) -> ChannelGraph:
    """Trace the channels of a LightningModule through its training step and through its `forward`.

    In evaluation mode the first call that raises no error is traced: `forward` of the module's `example_input_array` (a
    dict holds keyword arguments, as in Lightning), `forward` of the batch's inputs, `forward` of the whole batch,
    `forward` of the items of a dict batch as keyword arguments, the loss of the batch. In training mode it is
    `training_step`. If the step cannot be followed, `forward` is traced in both modes, and layers that the step needs
    whole are found by running it on smaller networks.

    Args:
        module: The module, attached to its Trainer.
        batch: A training batch on the module's device.
        loss_fn: ``loss_fn(module, batch)`` returns the scalar loss.
        effects: Side effects on the module, which are undone.
        watch: Finds the copies of parts of the module.
        residual: As in `trace_channels`.
        exact_only: As in `trace_channels`.

    Raises:
        SettingsError: None of these calls succeeds, or the step fails on every smaller network.
    """
    # Try out what can be called, on few examples if these are enough.
    for example in (first_examples(batch, _MAX_EXAMPLES), batch):
        step = _tried_step(module, example, effects)
        forward, reasons = _tried_forward(module, example, loss_fn, effects)
        if forward is not None and (step is None or step.error is None):
            break
    if forward is None:
        raise SettingsError(
            f"`forward` of {type(module).__name__} runs neither on the inputs of a training batch ({reasons[0]}) nor "
            f"on the whole batch, and the loss of the batch cannot be computed ({reasons[-1]}): set the module's "
            "`example_input_array` to inputs that `forward` takes."
        )

    # What is copied, what only the step runs without training it, and what nothing runs.
    training = training_of(module, step)
    copies = watch.find(module, training)
    called = frozenset() if forward.is_loss else forward.modules
    in_step = frozenset() if step is None else step.modules
    whole = {
        name: f"'{name}' is not trained, and `forward` does not run it: a teacher stays as it is"
        for name in frozen_outside(module, training, called, in_step, copies.modules)
    }
    calls: dict[bool, list[Call]] = {mode: [(forward.function, forward.arguments)] for mode in (True, False)}
    further, unread = further_calls(module, example, forward.modules | in_step, copies.modules, effects)
    options: dict[str, Any] = {
        "copies": copies.for_trace(),
        "unread": unread,
        "residual": residual,
        "exact_only": exact_only,
    }

    # Trace all calls together, or else the forward alone.
    with true_precision(module):
        if step is not None and step.error is None:
            joint = {True: [(step_of_training(module), (example,))], False: calls[False]}
            try:
                if further:
                    return trace_calls(module, {**joint, False: [*calls[False], *further]}, whole=whole, **options)
                return trace_calls(module, joint, whole=whole, **options)
            except CallError as error:
                cause = error.__cause__
                step = replace(step, error=cause if isinstance(cause, Exception) else error)
        graph = trace_calls(module, calls, must_run=False, **options)
    if step is not None and step.modules:
        return without_needed_groups(module, graph, step_of_training(module), example, step, effects)
    return graph


def _tried_step(module: pl.LightningModule, batch: object, effects: SideEffects) -> Trial | None:
    """Run the training step; None if the module has none that takes a batch."""
    defaults = [getattr(base, "training_step", None) for base in both_packages(pl.LightningModule)]
    if (
        type(module).training_step in defaults
        or "dataloader_iter" in inspect.signature(module.training_step).parameters
    ):
        return None
    return try_call(module, step_of_training(module), (batch,), effects, training=True)


def _tried_forward(
    module: pl.LightningModule,
    batch: object,
    loss_fn: Callable[[pl.LightningModule, Any], Tensor],
    effects: SideEffects,
) -> tuple[_Forward | None, list[str]]:
    """Return the first call in evaluation mode that succeeds, if any, and why the others have failed."""

    def loss_of_batch(whole_batch: object) -> Tensor:
        return loss_fn(module, whole_batch)

    calls: list[Call] = [(module, (batch_inputs(batch),)), (module, (batch,)), (loss_of_batch, (batch,))]
    keywords = keywords_of(module, batch)
    if keywords is not None:
        calls.insert(2, (lambda keywords: module(**keywords), (keywords,)))
    examples = [] if module.example_input_array is None else [_call_of_example(module)]
    reasons: list[str] = []
    for function, arguments in (*examples, *calls):
        with true_precision(module):
            trial = try_call(module, function, arguments, effects, training=False)
        if trial.error is None:
            return _Forward(function, arguments, trial.modules, function is loss_of_batch), reasons
        first_line = str(trial.error).partition("\n")[0]
        reasons.append(f"{type(trial.error).__name__}: {first_line}"[:160])
    return None, reasons[len(examples) :]


def training_of(module: pl.LightningModule, step: Trial | None = None) -> Training:
    """Return which parameters an optimizer holds and trains, and which the step changes by itself.

    Args:
        module: The module.
        step: What a trial of the step has shown; None if there was none. All parameters that an optimizer holds then
            count as trained.
    """
    trainer = attached_trainer(module)
    optimizers = [] if trainer is None else trainer.strategy.optimizers
    names = {id(p): name for name, p in module.named_parameters()}
    parameters = {id(p): p for o in optimizers for group in o.param_groups for p in group["params"] if id(p) in names}
    if not optimizers:
        parameters = {id(p): p for p in module.parameters() if p.requires_grad}
    stepped = {id(p) for o in optimizers for p, state in o.state.items() if state}
    reached = None if step is None or step.error is not None else step.trained
    trained = {
        names[key]
        for key, p in parameters.items()
        if p.requires_grad and (reached is None or names[key] in reached or key in stepped or p.grad is not None)
    }
    return Training(trained, {names[key] for key in parameters}, () if step is None else step.changed)


def _call_of_example(module: pl.LightningModule) -> Call:
    """Return a function and its arguments that call the module with its example input.

    This is its `example_input_array`, prepared as Lightning does.
    """
    example = module.trainer.precision_plugin.convert_input(module.example_input_array)
    example = fabric.utilities.apply_func.move_data_to_device(example, module.device)
    if isinstance(example, Mapping):
        return (lambda keywords: module(**keywords)), (dict(example),)
    return module, example if isinstance(example, tuple) else (example,)


def is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile` was applied to a module or one of its submodules."""
    # Private: the wrapper that `torch.compile` returns, `nn.Module.compile`, and `torch.compile` of a LightningModule.
    # Without them dynamo's caches would not be reset at a cut, and after a few cuts it would stop compiling.
    return any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_compiler_ctx")
        for m in module.modules()
    )

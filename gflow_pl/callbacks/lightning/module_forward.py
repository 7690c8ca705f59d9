"""The `forward` of a LightningModule: trace the network through it, and find out whether it is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gflow_pl.callbacks.lightning.precision import true_precision
from gflow_pl.callbacks.lightning.training_loss import batch_inputs
from gflow_pl.channels import keywords_of, trace_channels
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.common.lightning_package import fabric, pl
from gflow_pl.common.nested import copy_nested
from gflow_pl.values import ChannelGraph
from gflow_pl.values.choices import Residual

__all__ = ["is_compiled", "trace_module"]

_Forward = Callable[..., object]


def trace_module(
    module: pl.LightningModule,
    batch: object,
    loss_fn: Callable[[pl.LightningModule, Any], Tensor],
    *,
    residual: Residual = "expand",
    exact_only: bool = False,
) -> ChannelGraph:
    """Trace the channels of a LightningModule, whose `forward` may take anything.

    The first call that raises no error is traced: `forward` of the module's `example_input_array` (a dict holds keyword
    arguments, as in Lightning), `forward` of the batch's inputs, `forward` of the whole batch, `forward` of the items
    of a dict batch as keyword arguments, the loss of the batch.

    Args:
        module: The module, attached to its Trainer.
        batch: A training batch on the module's device.
        loss_fn: ``loss_fn(module, batch)`` returns the scalar loss.
        residual: As in `trace_channels`.
        exact_only: As in `trace_channels`.

    Raises:
        SettingsError: None of these calls succeeds.
    """
    forward = module.forward

    def loss_of_batch(whole_batch: object) -> Tensor:
        with _forward_replaced(module, forward):  # the loss may call the module
            return loss_fn(module, whole_batch)

    calls: list[tuple[_Forward, tuple[object, ...]]] = [
        (forward, (batch_inputs(batch),)),
        (forward, (batch,)),
        (loss_of_batch, (batch,)),
    ]
    keywords = keywords_of(module, batch)
    if keywords is not None:
        calls.insert(2, (lambda keywords: forward(**keywords), (keywords,)))
    num_calls_of_batch = len(calls)
    if module.example_input_array is not None:
        calls.insert(0, _call_of_example(module, forward))

    # Find the first call that succeeds.
    reasons = []
    for function, arguments in calls:
        with _forward_replaced(module, function), true_precision(module):
            try:
                with evaluation_mode(module), torch.no_grad():
                    module(*copy_nested(arguments, Tensor.clone))
            except Exception as error:  # the module's own code may raise anything
                first_line = str(error).partition("\n")[0]
                reasons.append(f"{type(error).__name__}: {first_line}"[:160])
                continue
            return trace_channels(module, arguments, residual=residual, exact_only=exact_only)
    raise SettingsError(
        f"`forward` of {type(module).__name__} runs neither on the inputs of a training batch "
        f"({reasons[-num_calls_of_batch]}) nor on the whole batch, and the loss of the batch cannot be computed "
        f"({reasons[-1]}): set the module's `example_input_array` to inputs that `forward` takes."
    )


def _call_of_example(module: pl.LightningModule, forward: _Forward) -> tuple[_Forward, tuple[object, ...]]:
    """Return a function and its arguments that call `forward` with the module's example input.

    This is its `example_input_array`, prepared as Lightning does.
    """
    example = module.trainer.precision_plugin.convert_input(module.example_input_array)
    example = fabric.utilities.apply_func.move_data_to_device(example, module.device)
    if isinstance(example, Mapping):
        return (lambda keywords: forward(**keywords)), (dict(example),)
    return forward, example if isinstance(example, tuple) else (example,)


@contextmanager
def _forward_replaced(module: pl.LightningModule, function: _Forward) -> Iterator[None]:
    """Make a function the module's `forward` for the time of the block."""
    before = module.__dict__.get("forward")  # set on the instance by `torch.compile` of a LightningModule
    module.__dict__["forward"] = function
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile` was applied to a module or one of its submodules."""
    # Private: the wrapper that `torch.compile` returns, `nn.Module.compile`, and `torch.compile` of a LightningModule.
    # Without them dynamo's caches would not be reset at a cut, and after a few cuts it would stop compiling.
    return any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_compiler_ctx")
        for m in module.modules()
    )

"""The trace of a LightningModule through its `forward`, or through its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from gflow_pl.callbacks.lightning.training_loss import batch_inputs, true_precision
from gflow_pl.channels import trace_channels
from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.values import ChannelGraph

__all__ = ["trace_module"]


def trace_module(
    module: pl.LightningModule, batch: Any, loss_fn: Callable[[Any, Any], Tensor], **options: Any
) -> ChannelGraph:
    """Trace a LightningModule as it stands in training, by its `forward`, or by its loss if it has none that runs.

    `forward` is tried on the module's `example_input_array` (a dict gives arguments by name, as in Lightning), on the
    batch's first part, and on the whole batch.

    Raises:
        ValueError: Neither `forward` nor the loss runs on any of them.
    """
    forward, example = module.forward, module.example_input_array

    def by_loss(whole: Any) -> Tensor:
        with _forward_of(module, forward):  # which the loss may well call
            return loss_fn(module, whole)

    ways: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (forward, (batch_inputs(batch),)),
        (forward, (batch,)),
        (by_loss, (batch,)),
    ]
    if example is not None:
        example = module.trainer.precision_plugin.convert_input(example)
        example = move_data_to_device(example, module.device)
        if isinstance(example, Mapping):
            ways.insert(0, (lambda named: forward(**named), (dict(example),)))
        else:
            ways.insert(0, (forward, example if isinstance(example, tuple) else (example,)))
    reasons = []
    for way, inputs in ways:
        with _forward_of(module, way), true_precision(module):
            try:
                with evaluation_mode(module), torch.no_grad():
                    module(*inputs)
            except Exception as error:  # a foreign forward may raise anything on inputs that are not its own
                reasons.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160])
                continue
            return trace_channels(module, inputs, **options)
    raise ValueError(
        f"`forward` of {type(module).__name__} runs neither on the first part of a training batch ({reasons[-3]}) nor on the "
        f"whole batch, and its loss cannot be taken of one ({reasons[-1]}): set the module's `example_input_array` to "
        "inputs that `forward` takes."
    )


@contextmanager
def _forward_of(module: pl.LightningModule, way: Callable[..., Any]) -> Iterator[None]:
    """Within, `way` is what the module's `forward` does."""
    before = module.__dict__.get("forward")  # `torch.compile` of a LightningModule leaves one there
    module.__dict__["forward"] = way
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before

"""The steps of a round on one network: trace it, measure it, rewrite it and everything of its shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from gflow_pl.callbacks.lightning.packages import averages_of, callbacks_of, is_a
from gflow_pl.callbacks.lightning.ranks import rebuild_wrapper
from gflow_pl.callbacks.lightning.training_loss import first_input, true_precision
from gflow_pl.channels import trace_channels
from gflow_pl.common.evaluation_mode import evaluation_mode
from gflow_pl.selection import cost_after
from gflow_pl.surgery import drop_state, rewrite
from gflow_pl.values import ChannelGraph, KeepPlan

__all__ = [
    "apply_plan",
    "costs_of",
    "last_saves",
    "reset_best",
    "stem_groups",
    "trace_module",
]


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
        (forward, (first_input(batch),)),
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


def stem_groups(graph: ChannelGraph) -> list[str]:
    """Expanded groups whose layer reads the network's input: where a residual stream begins (the paper protects it)."""
    return [
        group.name
        for group in graph.groups
        if group.kind == "expand" and any(graph.layers[part.layer].reads_input for part in group.layers)
    ]


def apply_plan(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    graph: ChannelGraph,
    plan: KeepPlan,
    *,
    keep_momentum: bool,
    copies: Iterable[dict[str, Tensor]] = (),
) -> None:
    """Rewrite the module and everything of the Trainer that has its shape."""
    optimizers = list(trainer.strategy.optimizers)
    if not keep_momentum:
        drop_state(optimizers)
    # Other callbacks may hold tensors of the parameters' shapes, and say so by this method.
    held = [c.tensors_by_name() for c in callbacks_of(trainer) if hasattr(c, "tensors_by_name")]
    rewrite(module, graph, plan, optimizers=optimizers, copies=[*averages_of(trainer), *copies, *held])
    if _is_compiled(module):
        # One recompilation a round would soon reach dynamo's limit, after which it silently stops compiling.
        torch._dynamo.reset()
    rebuild_wrapper(trainer, module)


def _is_compiled(module: nn.Module) -> bool:
    return any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_compiler_ctx")
        for m in module.modules()
    )


def last_saves(trainer: pl.Trainer) -> dict[ModelCheckpoint, int]:
    """The step of the last save of every ModelCheckpoint that monitors nothing: its file of that step counts as best."""
    every = [c for c in callbacks_of(trainer) if is_a(c, "ModelCheckpoint") and c.monitor is None]
    return {checkpoint: checkpoint._last_global_step_saved for checkpoint in every if checkpoint.best_model_path}


def reset_best(trainer: pl.Trainer) -> list[str]:
    """Make monitored ModelCheckpoints and EarlyStopping start anew: what was best before the cut is another network.

    Returns:
        The files that were best until now.
    """
    forgotten = []
    for checkpoint in callbacks_of(trainer):
        if is_a(checkpoint, "ModelCheckpoint") and getattr(checkpoint, "monitor", None) is not None:
            if checkpoint.best_model_path:
                forgotten.append(checkpoint.best_model_path)
            _forget(checkpoint)
        elif is_a(checkpoint, "EarlyStopping"):
            checkpoint.wait_count = 0
            checkpoint.best_score = torch.tensor(torch.inf if checkpoint.mode == "min" else -torch.inf)
    return forgotten


def _forget(checkpoint: ModelCheckpoint) -> None:
    checkpoint.best_k_models = {}
    checkpoint.kth_best_model_path = ""
    checkpoint.best_model_score = None
    checkpoint.best_model_path = ""
    checkpoint.kth_value = torch.tensor(torch.inf if checkpoint.mode == "min" else -torch.inf)


def costs_of(graph: ChannelGraph) -> dict[str, int]:
    """Filters, parameters and multiply-accumulates of the network as it is now."""
    parameters, macs = cost_after(graph)
    return {"filters": graph.num_filters, "parameters": parameters, "macs": macs}

"""The steps of a round on one network: its costs, its stem, and the rewrite of everything of its shape."""

from __future__ import annotations

from collections.abc import Iterable

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from gflow_pl.callbacks.lightning.module_forward import is_compiled
from gflow_pl.callbacks.lightning.packages import averaged_models, callbacks_of
from gflow_pl.callbacks.lightning.ranks import rebuild_ddp
from gflow_pl.selection import cost_after
from gflow_pl.surgery import drop_state, rewrite
from gflow_pl.values import ChannelGraph, KeepPlan

__all__ = ["apply_plan", "costs_of", "stem_groups"]


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
    held = [c.tensors_by_name() for c in callbacks_of(trainer, Callback) if hasattr(c, "tensors_by_name")]
    rewrite(module, graph, plan, optimizers=optimizers, copies=[*averaged_models(trainer), *copies, *held])
    if is_compiled(module):
        # One recompilation a round would soon reach dynamo's limit, after which it silently stops compiling.
        torch._dynamo.reset()
    rebuild_ddp(trainer, module)


def costs_of(graph: ChannelGraph) -> dict[str, int]:
    """Filters, parameters and multiply-accumulates of the network as it is now."""
    parameters, macs = cost_after(graph)
    return {"filters": graph.num_filters, "parameters": parameters, "macs": macs}

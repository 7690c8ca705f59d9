"""The operators that a loss is computed with, as far as they decide how it can be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from gflow_pl.importance.batches import Batch
from gflow_pl.importance.gradients import LossFn, graph_nodes, scalar_loss
from gflow_pl.importance.scoring_mode import cached_weights

__all__ = ["OUTSIDE_GRAPH", "custom_functions", "loss_and_operators"]

# The names of these two are not those of operators.
OUTSIDE_GRAPH = "a computation outside of the autograd graph"
_BATCH_STATISTICS = "a batch norm with the statistics of its batch"

_READ_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


def loss_and_operators(loss: LossFn, model: nn.Module, batch: Batch) -> tuple[Tensor, frozenset[str]]:
    """Return the loss of a batch and the names of the operators that it is computed with.

    The names are those of the nodes in the autograd graph, and `OUTSIDE_GRAPH` if the forward pass computes anything
    under ``torch.no_grad()`` or reads ``.data``: forward-mode derivatives would flow through it, and the
    Hessian-vector product would differ from that of double backward.
    """
    with cached_weights(model), _OutsideGraph() as outside:
        value = scalar_loss(loss, model, batch)
    operators = frozenset(map(_operator, graph_nodes(value)))
    return value, operators | {OUTSIDE_GRAPH} if outside.seen else operators


def custom_functions(value: Tensor) -> list[str]:
    """Return the class names of all `torch.autograd.Function` nodes in the graph of a tensor, sorted."""
    return sorted({type(node).__name__ for node in graph_nodes(value) if isinstance(node, BackwardCFunction)})


def _operator(node: Node) -> str:
    name = node.name().split("Backward")[0]
    if isinstance(node, BackwardCFunction):
        return f"custom function {name}"
    if name in ("NativeBatchNorm", "CudnnBatchNorm"):  # with running statistics the two have the same derivatives
        return _BATCH_STATISTICS if getattr(node, "_saved_training") else "NativeBatchNorm"  # noqa: B009
    return name


class _OutsideGraph(TorchFunctionMode):
    """Observes whether anything is computed without a graph, or taken out of it as ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.seen = self.seen or not torch.is_grad_enabled() or func == _READ_DATA
        return func(*args, **(kwargs or {}))

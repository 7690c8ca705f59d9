"""The size of a network: multiply-accumulates, parameters, bytes, and filters of the layers that can be pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from gflow_pl.reports.counts import count_network, state_bytes
from gflow_pl.reports.table import NetworkReport

__all__ = ["Size"]


@dataclass(frozen=True)
class Size:
    """The size of a network.

    Attributes:
        macs: Multiply-accumulates of the example input; None without an example.
        parameters: Number of elements of all parameters.
        state_bytes: Bytes of the saved state dict alone.
        filters_by_layer: Name to number of filters of every layer that can be pruned; None if these layers are unknown.
    """

    macs: int | None
    parameters: int
    state_bytes: int
    filters_by_layer: Mapping[str, int] | None

    @classmethod
    def of(cls, network: nn.Module, example: object | None, prunable: Iterable[str] | None) -> Size:
        """Measure the size of a network in its present shape.

        Args:
            network: Any module, pruned or not.
            example: An input for one forward pass (a tuple holds the positional arguments), or None if none is known.
            prunable: Names of the layers that can be pruned, or None if they are unknown.
        """
        layers = dict(network.named_modules())
        return cls(
            macs=None if example is None else count_network(network, example).macs,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            state_bytes=state_bytes(network.state_dict()),
            filters_by_layer=None if prunable is None else {name: _num_filters(layers[name]) for name in prunable},
        )

    @property
    def filters(self) -> int | None:
        """Number of filters of all layers that can be pruned."""
        return None if self.filters_by_layer is None else sum(self.filters_by_layer.values())

    def report(
        self, name: str, *, train_accuracy: float | None = None, test_accuracy: float | None = None
    ) -> NetworkReport:
        """Return a column of the comparison table: this size together with measured accuracies in [0, 1]."""
        return NetworkReport(
            name,
            macs=self.macs,
            parameters=self.parameters,
            state_bytes=self.state_bytes,
            filters=self.filters,
            train_accuracy=train_accuracy,
            test_accuracy=test_accuracy,
        )


def _num_filters(layer: nn.Module) -> int:
    return int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0))

"""Sizes of networks: counts, and filters of the layers that can be pruned."""

import torch
from torch import nn

from gflow_pl.reports import Size, count_network, state_bytes

NETWORK = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_a_size_has_the_counts_of_the_network() -> None:
    size = Size.of(NETWORK, EXAMPLE, ["0"])
    assert size.macs == count_network(NETWORK, EXAMPLE).macs == 36 * 8 * 27 + 8 * 36 * 5
    assert size.parameters == 8 * 27 + 8 + 8 * 36 * 5 + 5
    assert size.state_bytes == state_bytes(NETWORK.state_dict())


def test_filters_are_those_of_the_layers_that_can_be_pruned() -> None:
    assert Size.of(NETWORK, EXAMPLE, ["0"]).filters_by_layer == {"0": 8}
    assert Size.of(NETWORK, EXAMPLE, ["0", "3"]).filters == 8 + 5
    assert Size.of(NETWORK, EXAMPLE, []).filters == 0


def test_unknown_numbers_are_none() -> None:
    size = Size.of(NETWORK, None, None)
    assert (size.macs, size.filters, size.filters_by_layer) == (None, None, None)
    assert size.parameters > 0


def test_a_column_of_the_report_has_the_size_and_the_accuracies() -> None:
    size = Size.of(NETWORK, EXAMPLE, ["0"])
    column = size.report("pruned", test_accuracy=0.5)
    assert (column.name, column.macs, column.parameters) == ("pruned", size.macs, size.parameters)
    assert (column.state_bytes, column.filters) == (size.state_bytes, 8)
    assert (column.train_accuracy, column.test_accuracy) == (None, 0.5)

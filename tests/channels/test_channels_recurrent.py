"""Hidden units of recurrent layers."""

import copy

import pytest
import torch
from masked_networks import compare_with_masked, random_plan
from torch import nn

from gflow_pl import apply_structure, rewrite, score_filters, structure_of, trace_channels

KINDS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
SETTINGS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "deep": {"num_layers": 2, "dropout": 0.1},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "no_bias": {"bias": False},
    "projected": {"proj_size": 4, "bidirectional": True},
}


class Recurrent(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        width = (settings.get("proj_size") or 8) * (1 + settings.get("bidirectional", False))
        self.stem, self.layer, self.head = nn.Linear(5, 10), kind(10, 8, **settings), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.layer(self.stem(x))[0])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_units_are_removed_exactly(kind, settings):
    if settings == "projected" and kind != "lstm":
        pytest.skip("only an LSTM projects its hidden state")
    model = Recurrent(KINDS[kind], **SETTINGS[settings])
    off, change, graph, small = compare_with_masked(model, (torch.randn(2, 6, 5),))
    assert off < 1e-12 < 1e-3 < change
    assert graph.coverage() == 1.0
    assert all(group.inexact is None for group in graph.groups)
    layer = small.layer
    assert (layer.input_size, layer.hidden_size, layer.weight_hh_l0.shape[0] // layer.hidden_size) == (
        5,
        4,
        {"rnn": 1, "gru": 3, "lstm": 4}[kind],
    )
    if settings == "projected":
        assert layer.proj_size == 2
    assert all(used is own for used, own in zip(layer._flat_weights, layer.parameters(), strict=True))


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_hidden_units_of_cells_are_removed_exactly(cell):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = cell(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    off, change, graph, small = compare_with_masked(Steps(), (torch.randn(2, 4, 5),))
    assert off < 1e-12 < 1e-3 < change
    assert (graph.coverage(), small.cell.hidden_size) == (1.0, 4)


def test_a_first_state_of_fixed_width_keeps_the_hidden_units():
    class Started(Recurrent):
        def forward(self, x):
            return self.head(self.layer(self.stem(x), torch.zeros(1, x.shape[1], 8, dtype=x.dtype))[0])

    graph = trace_channels(Started(nn.GRU), torch.randn(6, 2, 5))
    assert [group.name for group in graph.groups] == ["stem"]
    assert set(graph.frozen) == {"layer.weight_ih_l0", "layer.weight_hh_l0", "head"}


def test_a_pruned_recurrent_layer_trains_and_is_rebuilt():
    torch.manual_seed(0)
    model, x = Recurrent(nn.LSTM, num_layers=2), torch.randn(6, 2, 5)
    fresh, graph = copy.deepcopy(model), trace_channels(model, x)
    scores = score_filters(
        model, "loss", [(x, torch.zeros(()))], graph=graph, loss_fn=lambda m, b: m(b[0]).square().mean()
    )
    assert all(len(scores[name]) == layer.num_filters for name, layer in graph.layers.items())
    rewrite(model, graph, random_plan(graph))
    model(x).square().mean().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))

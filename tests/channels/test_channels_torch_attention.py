"""`nn.MultiheadAttention` and the transformers of torch that contain it: whole heads are removed."""

import copy
import pickle

import pytest
import torch
from masked_networks import compare_with_masked, random_plan, randomize_parameters
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from gflow_pl import apply_structure, rewrite, structure_of, trace_channels
from gflow_pl.common.own_width_attention import OwnWidthAttention


class Encoder(nn.Module):
    def __init__(self, batch_first=True, **settings):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=batch_first, dropout=0.0, **settings)
        self.stem, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, mask=None):
        return self.head(self.layers(self.stem(x), mask))


class Attention(nn.Module):
    """Attention of one sequence over another one."""

    def __init__(self, **settings):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 12), nn.Linear(5, settings.get("kdim", 12)), nn.Linear(12, 3)
        self.attention = nn.MultiheadAttention(12, 3, **settings)
        self.num_masks = 0

    def forward(self, x, y):
        y = self.b(y)
        mask = x.new_zeros(self.num_masks, len(x), len(y)) if self.num_masks else None
        return self.head(self.attention(self.a(x), y, y, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", ["expand", "remove"])
@pytest.mark.parametrize("settings", [{}, {"norm_first": True, "activation": "gelu"}, {"batch_first": False}])
def test_encoders_lose_whole_heads_exactly(residual, settings, masked):
    inputs = (torch.randn(7, 7, 5), nn.Transformer.generate_square_subsequent_mask(7))[: 1 + masked]
    off, change, graph, small = compare_with_masked(Encoder(**settings), inputs, residual=residual)
    assert off < 1e-12 < 1e-3 < change
    assert graph.coverage() == 1.0
    heads = graph.group("layers.layers.0.self_attn")
    assert (heads.size, heads.filters, heads.kind, heads.inexact) == (3, 12, "remove", None)
    attention = small.layers.layers[0].self_attn
    assert (attention.num_heads, attention.head_dim, attention.in_proj_weight.shape[0]) == (1, 4, 12)
    assert attention.out_proj.in_features == 4
    small.train()(*(x.double() for x in inputs)).sum().backward()


@pytest.mark.parametrize("settings", [
    {}, {"kdim": 8, "vdim": 8}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"batch_first": True}
])  # fmt: skip
def test_cross_attention_loses_whole_heads_exactly(settings):
    inputs = torch.randn(4, 4, 5), torch.randn(6, 4, 5)
    if settings.get("batch_first"):
        inputs = torch.randn(4, 3, 5), torch.randn(4, 6, 5)
    off, change, graph, small = compare_with_masked(Attention(**settings), inputs)
    assert off < 1e-12 < 1e-3 < change
    assert graph.coverage() == 1.0
    heads = [group for group in graph.groups if group.name.startswith("attention") and "out" not in group.name]
    assert [(group.size, group.filters, group.inexact) for group in heads] == [(3, 12, None)]
    assert small.attention.num_heads == 1


def test_decoders_lose_heads_of_both_attentions():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer = nn.Linear(5, 12), nn.TransformerDecoderLayer(12, 3, 16, dropout=0.0)
            self.queries, self.head = nn.Parameter(torch.randn(4, 1, 12)), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.layer(self.queries.expand(-1, x.shape[1], -1), self.stem(x)))

    off, change, graph, _ = compare_with_masked(Decoder(), (torch.randn(6, 2, 5),))
    assert off < 1e-12 < 1e-3 < change
    assert graph.group("layer.self_attn").size == graph.group("layer.multihead_attn").size == 3


def test_a_vision_transformer_of_torchvision_is_covered():
    model = VisionTransformer(16, 8, 2, 4, 24, 48, num_classes=5)
    off, change, graph, _ = compare_with_masked(model, (torch.randn(2, 3, 16, 16),))
    assert off < 1e-12 < 1e-3 < change
    assert graph.coverage() == 1.0
    cut = {part.tensor for group in graph.groups for part in group.slices if part.dim == 0}
    names = [name for name, _ in model.named_parameters() if name.endswith(("in_proj_weight", "out_proj.weight"))]
    assert len(names) == 4
    assert set(names) <= cut


def test_heads_with_masks_of_their_own_stay_and_lose_positions_of_their_width():
    model = Attention()
    model.num_masks = 2 * 3
    inputs = torch.randn(4, 2, 5), torch.randn(6, 2, 5)
    off, change, graph, pruned = compare_with_masked(model, inputs, only=lambda group: group.name == "attention")
    group = graph.group("attention")
    assert (group.size, group.filters) == (4, 9)  # the same positions of all heads of queries, keys and values
    assert "follows the width" in group.inexact
    assert pruned.attention.num_heads == 3
    assert off > 1e-6  # the scale changes
    assert change > 1e-3


def test_heads_are_inexact_if_their_weights_are_averaged():
    class Averaged(Attention):
        def forward(self, x, y):
            y = self.b(y)
            output, weights = self.attention(self.a(x), y, y)
            return self.head(output) + weights.sum()

    graph = trace_channels(Averaged(), (torch.randn(4, 2, 5), torch.randn(6, 2, 5)))
    assert graph.group("attention").inexact is not None


def test_a_class_of_the_user_keeps_its_forward():
    class Own(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = Attention()
    model.attention.__class__ = Own
    off, change, _, small = compare_with_masked(model, (torch.randn(4, 2, 5), torch.randn(6, 2, 5)))
    assert off < 1e-12 < 1e-3 < change
    assert type(small.attention) is Own
    assert type(model.attention) is Own


def pruned_encoder():
    torch.manual_seed(0)
    model = randomize_parameters(Encoder()).eval()
    graph = trace_channels(model, torch.randn(2, 7, 5))
    small = copy.deepcopy(model)
    rewrite(small, graph, random_plan(graph, 0.4))
    return model, small


@pytest.mark.parametrize("inference", [False, True])
def test_pruned_encoders_take_no_fast_path(inference):
    _, small = pruned_encoder()
    x = torch.randn(2, 7, 5)
    with torch.inference_mode(inference):
        expected = small.train()(x)
        torch.testing.assert_close(small.eval()(x), expected)


def test_a_pruned_encoder_is_copied_pickled_scripted_and_rebuilt():
    model, small = pruned_encoder()
    x = torch.randn(2, 7, 5)
    expected = small(x)
    assert type(small.layers.layers[0].self_attn) is OwnWidthAttention
    assert torch.equal(copy.deepcopy(small)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), expected)
    query = torch.randn(5, 2, 12)
    attention = copy.deepcopy(small.layers.layers[0].self_attn)
    for hook in list(attention.out_proj._forward_hooks):
        del attention.out_proj._forward_hooks[hook]
    attention._forward_pre_hooks.clear()  # the guard of that expansion, which cannot be scripted for several inputs
    torch.testing.assert_close(torch.jit.script(attention)(query, query, query), attention(query, query, query))

    # The structure rebuilds the pruned network, and then the full one again.
    full = structure_of(model)
    fresh = copy.deepcopy(model)
    apply_structure(fresh, structure_of(small))
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), expected)
    apply_structure(fresh, full)
    assert type(fresh.layers.layers[0].self_attn) is nn.MultiheadAttention
    assert fresh.layers.layers[0].self_attn.num_heads == 3
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_a_second_round_continues_from_the_first():
    torch.manual_seed(0)
    model, x = randomize_parameters(Encoder().double()).eval(), torch.randn(2, 7, 5).double()
    graph = trace_channels(model, x)
    rewrite(model, graph, random_plan(graph, 0.3))
    again = trace_channels(model, x)
    assert {g.name: (g.size, g.kind) for g in again.groups} == {g.name: (g.size, g.kind) for g in graph.groups}
    for plan_of in (graph, again):
        once = copy.deepcopy(model)
        rewrite(once, plan_of.copy(), random_plan(plan_of, 0.4, seed=1))
        assert once.layers.layers[0].self_attn.num_heads == 1


def test_a_structure_of_an_older_version_with_narrower_heads_is_applied():
    model = nn.MultiheadAttention(12, 3)
    apply_structure(model, structure_of(nn.MultiheadAttention(6, 3)))
    assert (type(model), model.num_heads, model.head_dim) == (nn.MultiheadAttention, 3, 2)
    x = torch.randn(4, 2, 6)
    assert model(x, x, x)[0].shape == x.shape

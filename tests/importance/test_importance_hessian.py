"""Hessian-gradient products: two ways, their fallbacks and what is refused."""

import logging

import pytest
import torch
from importance_nets import class_batches, largest_difference, mixed
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gflow_pl.importance import measure_names, resolve_measure, score_filters
from gflow_pl.importance.evaluation import scoring_mode
from gflow_pl.importance.gradients import loss_function
from gflow_pl.importance.hessian import HessianProducts, second_order_kernels
from gflow_pl.importance.layers import find_layers, unique_refs
from gflow_pl.importance.ranks import Ranks

WAYS = ("forward_over_reverse", "double_backward")


def products(net, batches, way=None):
    layers = find_layers(net)
    with scoring_mode(net), second_order_kernels():
        made = HessianProducts(
            net, layers, unique_refs(layers, "weight"), loss_function(None, None, 1.0), batches[0], way
        )
        return made.way, made.of(batches, Ranks())


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = mixed(), reentrant

    def forward(self, x):
        net = self.inner
        x = checkpoint(
            lambda x: torch.tanh(net.bn1(net.conv1(x))), x + 0 * net.conv1.bias[0], use_reentrant=self.reentrant
        )
        return net.head(torch.tanh(net.hidden(torch.tanh(net.up(net.grouped(x))).mean((2, 3)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(10, 2, 16, dropout=0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(10, 3)
        self.double()

    def forward(self, x):
        return self.head(self.encoder(x.reshape(len(x), 5, 10)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(10, 6, batch_first=True), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.head(self.lstm(x.reshape(len(x), 5, 10))[0].mean(1))


@pytest.mark.parametrize("make", [mixed, lambda: Checkpointed(False), Attention])
def test_both_ways_agree(make):
    net, batches = make(), class_batches()
    found = {way: products(net, batches, way) for way in WAYS}
    assert all(found[way][0] == way for way in WAYS)
    one, other = (found[way][1] for way in WAYS)
    assert all(largest_difference(one[name], other[name]) < 1e-10 for name in other)


def test_the_way_follows_from_facts_of_the_model():
    net = mixed()
    assert products(net, class_batches())[0] == "forward_over_reverse"
    nn.utils.parametrizations.weight_norm(net.hidden)
    assert products(net, class_batches())[0] == "double_backward"


class Cube(torch.autograd.Function):
    """x^3, differentiable twice, but without forward derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class CubeNet(nn.Module):
    def __init__(self, cube):
        super().__init__()
        self.inner, self.cube = mixed(), cube

    def forward(self, x):
        return self.inner.head(self.cube(torch.tanh(self.inner.hidden(self.inner.conv1(x).mean((2, 3))))))


def test_an_operator_without_forward_derivative_falls_back_and_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="gflow_pl"):
        way, ours = products(CubeNet(Cube.apply), class_batches(), "forward_over_reverse")
    assert way == "double_backward"
    assert "jvp" in caplog.text
    _, theirs = products(CubeNet(lambda x: x**3), class_batches(), "double_backward")
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=0) for name in theirs)


class Held(nn.Module):
    """Keeps its weight in a list of its own, where no dual number reaches it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(50, 6), nn.Linear(6, 3)
        self.double()
        self.held = [self.first.weight]

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x.flatten(1), self.held[0])) + self.first.bias)


def test_weights_that_dual_numbers_do_not_reach_get_their_share_of_the_product(caplog):
    with caplog.at_level(logging.INFO, logger="gflow_pl"):
        way, _ = products(Held(), class_batches(), "forward_over_reverse")
    assert way == "double_backward"
    assert "do not reach the weight 'first.weight'" in caplog.text


def test_recurrent_weights_get_their_share_of_the_product():
    net, batches = Recurrent(), class_batches()
    _, ours = products(net, batches, "forward_over_reverse")
    _, theirs = products(net, batches, "double_backward")
    assert largest_difference(ours["head.weight"], theirs["head.weight"]) < 1e-9


@pytest.mark.parametrize("measure", [name for name in measure_names() if resolve_measure(name).needs_gradients])
def test_reentrant_checkpointing_is_refused_by_name(measure):
    with pytest.raises(ValueError, match="reentrant activation checkpointing"):
        score_filters(Checkpointed(True), measure, class_batches())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("measure", ["grasp", "grad_preserve"])
def test_what_can_be_differentiated_only_once_is_refused_before_anything_is_spent(measure):
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"needs second derivatives, which the model does not have .*OnceBackward"):
        score_filters(CubeNet(Once.apply), measure, class_batches(), loss_fn=loss)
    assert set(sizes) == {1}


def test_a_loss_without_curvature_has_products_of_zero():
    net = nn.Linear(50, 3).double()
    scores = score_filters(
        net, "grasp", class_batches(), loss_fn=lambda m, b: m(b[0].flatten(1)).mean(), balanced=False
    )
    assert (scores[""] == 0).all()


def test_one_batch_or_many_give_the_same_product():
    whole = [tuple(torch.cat(parts) for parts in zip(*class_batches(), strict=True))]
    _, one = products(mixed(), whole)
    _, many = products(mixed(), class_batches())
    assert all(largest_difference(many[name], one[name]) < 1e-10 for name in one)

"""Hessian-gradient products: two strategies, the choice between them, and the models that are refused."""

import logging

import pytest
import torch
from importance_nets import class_batches, largest_difference, mixed
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gflow_pl import models, rewrite, select_units, trace_channels
from gflow_pl.importance import hessian_strategies, measure_names, resolve_measure, score_filters
from gflow_pl.importance.gradients import graph_nodes, loss_function
from gflow_pl.importance.hessian import HessianProducts, flow_tensors, second_order_kernels
from gflow_pl.importance.layers import find_layers, unique_refs
from gflow_pl.importance.loss_operators import loss_and_operators
from gflow_pl.importance.reduction import Ranks
from gflow_pl.importance.scoring_mode import scoring_mode

FAST, SAFE = "reverse_over_forward", "double_backward"


def products(net, batches, strategy=None, loss=None):
    """The strategy that was taken, and the products."""
    layers, loss = find_layers(net), loss or loss_function(None, None, 1.0)
    with scoring_mode(net), second_order_kernels():
        found = HessianProducts(net, layers, unique_refs(layers, "weight"), loss, batches[0], strategy)
        return found.strategy, found.compute(batches, Ranks())


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


class Several(nn.Module):
    """Operators that `Mixed` lacks: in-place activations, pooling, other norms, bare parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.body = nn.Sequential(
            nn.GroupNorm(2, 6), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 6, 1, groups=6)
        )
        self.places = nn.Parameter(torch.randn(1, 4, 6))
        self.mix, self.head = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        x = self.body(self.conv(x)).flatten(2).transpose(1, 2) + self.places
        return self.head(F.hardswish(x + self.mix(x)).mean(1))


@pytest.mark.parametrize("make", [mixed, Several])
def test_both_strategies_agree(make):
    taken, ours = products(make(), class_batches())
    _, theirs = products(make(), class_batches(), SAFE)
    assert taken == FAST
    assert all(largest_difference(ours[name], theirs[name]) < 1e-10 for name in theirs)


def pairs(h):
    """Matrices from activations (examples, 4, 5, 5)."""
    return h.flatten(2).transpose(1, 2)


# For every operator that reverse over forward is used with, a function of activations that contains it.
OPERATORS = {
    "torch::autograd::AccumulateGrad": lambda h: h,
    "Convolution": lambda h: h,
    "Addmm": lambda h: F.linear(h.flatten(1), h.flatten(1)[:1].expand(7, -1), h[0, 0, 0, :1]),
    "Mm": lambda h: h[0].flatten(1) @ h[-1].flatten(1).T,
    "T": lambda h: h[0, 0].t() ** 2,
    "NativeBatchNorm": lambda h: F.batch_norm(h, h.new_full((4,), 0.3), h.new_full((4,), 0.7), h[0, :, 0, 0]),
    "NativeGroupNorm": lambda h: F.group_norm(h, 2, h[0, :, 0, 0], h[0, :, 0, 1]),
    "Relu": F.relu,
    "Hardtanh": F.relu6,
    "LeakyRelu": F.leaky_relu,
    "Elu": F.elu,
    "Gelu": lambda h: F.gelu(h) + F.gelu(h, approximate="tanh"),
    "Silu": F.silu,
    "Mish": F.mish,
    "Hardswish": lambda h: F.hardswish(h * 3),
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Softplus": F.softplus,
    "Softmax": lambda h: h.softmax(1),
    "Add": lambda h: h + h**2,
    "Sub": lambda h: h - h**2,
    "Mul": lambda h: h * h,
    "Div": lambda h: h / (h**2 + 1),
    "Neg": lambda h: -h,
    "Pow": lambda h: h**3,
    "Exp": torch.exp,
    "Abs": torch.abs,
    "Sum": lambda h: h.sum((2, 3)) ** 2 + h.sum(),
    "Mean": lambda h: h.mean((2, 3)) ** 2 + h.mean(),
    "MaxPool2DWithIndices": lambda h: F.max_pool2d(h, 2),
    "AvgPool2D": lambda h: F.avg_pool2d(h, 2),
    "AdaptiveAvgPool2D": lambda h: F.adaptive_avg_pool2d(h, 2),
    "UpsampleNearest2D": lambda h: F.interpolate(h, scale_factor=2.0),
    "UpsampleBilinear2D": lambda h: F.interpolate(h, scale_factor=2.0, mode="bilinear"),
    "ConstantPadNd": lambda h: F.pad(h, (1, 2)),
    "View": lambda h: h.view(len(h), 2, -1) ** 2,
    "UnsafeView": lambda h: h.transpose(1, 3) @ h[0, 0, :4, :4],
    "ReshapeAlias": lambda h: F.linear(pairs(h[:1]), h[0, 0, :3, :4]),
    "Unsqueeze": lambda h: h.unsqueeze(1) ** 2,
    "Squeeze": lambda h: h[:, :1].squeeze(1) ** 2,
    "Transpose": lambda h: h.transpose(2, 3) * h,
    "Permute": lambda h: h.permute(0, 1, 3, 2) * h,
    "Expand": lambda h: h[:, :1].expand(-1, 4, -1, -1) * h,
    "Slice": lambda h: h[:, 1:] * h[:, :-1],
    "Select": lambda h: h[:, 1] * h[:, 0],
    "Split": lambda h: h.split(2, 1)[0] * h.split(2, 1)[1],
    "Cat": lambda h: torch.cat([h, h**2], 1),
    "Stack": lambda h: torch.stack([h, h**2], 1),
    "Clone": lambda h: h.clone() ** 2,
    "Index": lambda h: h[:, torch.tensor([2, 0, 2])] ** 2,
    "IndexSelect": lambda h: h.index_select(1, torch.tensor([2, 0, 2])) ** 2,
    "IndexCopy": lambda h: h.new_zeros(len(h), 6, 5, 5).index_copy(1, torch.tensor([4, 1, 0, 2]), h) ** 2,
    "LogSoftmax": lambda h: h.log_softmax(1),
    "NllLoss": lambda h: F.nll_loss(h.flatten(1).log_softmax(1), torch.arange(len(h))),
    "MseLoss": lambda h: F.mse_loss(h, torch.ones_like(h)),
}


def test_every_operator_of_the_list_is_verified():
    assert set(OPERATORS) == hessian_strategies.FORWARD_DIFFERENTIABLE_TWICE


@pytest.mark.parametrize("operator", OPERATORS)
def test_reverse_over_forward_is_right_for_an_operator(operator):
    torch.manual_seed(0)
    net, batch = nn.Conv2d(2, 4, 3, padding=1).double(), class_batches(1)[0]
    seen = set()

    def loss(model, batch):
        value = OPERATORS[operator](model(batch[0])).pow(3).mean()
        seen.update(node.name().split("Backward")[0] for node in graph_nodes(value))
        return value

    taken, found = products(net, [batch], loss=loss)
    _, expected = products(net, [batch], SAFE, loss=loss)
    assert taken == FAST
    assert operator in seen
    assert largest_difference(found["weight"], expected["weight"]) < 1e-10
    assert expected["weight"].abs().max() > 0


@pytest.mark.parametrize(
    "operator",
    [
        lambda h: F.layer_norm(h, (5,)),
        lambda h: F.batch_norm(h, None, None, training=True),
        lambda h: F.instance_norm(h),
        lambda h: Detached.apply(h),
    ],
)
def test_reverse_over_forward_is_not_used_for_operators_that_it_is_wrong_for(operator):
    torch.manual_seed(0)
    net, batch = nn.Conv2d(2, 4, 3, padding=1).double(), class_batches(1)[0]

    def loss(model, batch):
        return operator(model(batch[0])).pow(3).mean()

    taken, _ = products(net, [batch], loss=loss)
    assert taken == SAFE
    _, right = products(net, [batch], SAFE, loss=loss)
    try:
        _, wrong = products(net, [batch], FAST, loss=loss)
    except ValueError:
        return  # it is refused, which is as good a reason
    assert largest_difference(wrong["weight"], right["weight"]) > 1e-6


@pytest.mark.parametrize("make", [lambda: Checkpointed(False), Attention, Recurrent])
def test_other_models_are_differentiated_by_double_backward(make):
    taken, ours = products(make(), class_batches())
    assert taken == SAFE
    layers = [name for name, module in make().named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    net = make().eval()
    with second_order_kernels():
        loss = sum(F.cross_entropy(net(x), y) for x, y in class_batches()) / 3
        parameters = dict(net.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, materialize_grads=True)
        speed = sum((g * g.detach()).sum() for g in gradients)
        products_by_hand = torch.autograd.grad(speed, list(parameters.values()), materialize_grads=True)
    theirs = dict(zip(parameters, products_by_hand, strict=True))
    assert all(largest_difference(ours[f"{layer}.weight"], theirs[f"{layer}.weight"]) < 1e-9 for layer in layers)


def test_fused_transformer_layers_are_enabled_again_after_scoring():
    score_filters(Attention(), "grasp", class_batches())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_compiled_network_is_differentiated_in_eager_mode():
    """A compiled graph can be differentiated only once."""
    torch._dynamo.reset()
    plain = mixed()
    nn.utils.parametrizations.weight_norm(plain.hidden)
    theirs = score_filters(plain, "grasp", class_batches())
    ours = score_filters(torch.compile(plain, backend="aot_eager"), "grasp", class_batches())
    assert all(torch.equal(ours[f"_orig_mod.{layer}"], theirs[layer]) for layer in theirs)


def test_a_derived_weight_is_differentiated_by_double_backward():
    net = mixed()
    assert products(net, class_batches())[0] == FAST
    nn.utils.parametrizations.weight_norm(net.hidden)
    assert products(net, class_batches())[0] == SAFE


@pytest.mark.parametrize("name", models.MODELS)
def test_every_network_of_the_package_is_differentiated_by_reverse_over_forward(name):
    net = getattr(models, name)(num_classes=10).eval()
    batch = (torch.randn(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))
    _, operators = loss_and_operators(loss_function(None, None, 5.0), net, batch)
    assert hessian_strategies.possible_strategies(flow_tensors(net, find_layers(net)), operators)[0] == FAST


def test_a_pruned_network_is_still_differentiated_by_reverse_over_forward():
    torch.manual_seed(0)
    net = models.resnet56(num_classes=3).double()
    graph = trace_channels(net, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    rewrite(net, graph, select_units(graph, score_filters(net, "random"), 0.5))
    batches = [(torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.arange(3))]
    taken, ours = products(net, batches)
    _, theirs = products(net, batches, SAFE)
    assert taken == FAST
    assert all(largest_difference(ours[name], theirs[name]) < 1e-10 for name in theirs)


class Detached(torch.autograd.Function):
    """x^3 with a forward derivative that autograd cannot differentiate, because it is computed from a detached x."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.x = inputs[0].detach()
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g

    @staticmethod
    def jvp(ctx, t):
        return 3 * ctx.x**2 * t


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


def test_a_function_without_forward_derivative_is_differentiated_by_double_backward():
    taken, ours = products(CubeNet(Cube.apply), class_batches())
    assert taken == SAFE
    _, theirs = products(CubeNet(lambda x: x**3), class_batches(), SAFE)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=0) for name in theirs)


class Held(nn.Module):
    """Keeps its weight in a list, where it cannot be replaced."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(50, 6), nn.Linear(6, 3)
        self.double()
        self.held = [self.first.weight]

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x.flatten(1), self.held[0])) + self.first.bias)


def test_weights_that_cannot_be_replaced_are_differentiated_by_double_backward_and_that_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="gflow_pl"):
        taken, _ = products(Held(), class_batches())
    assert taken == SAFE
    assert caplog.text.count("do not reach the weight 'first.weight'") == 1


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
def test_a_function_that_can_be_differentiated_only_once_is_refused_before_the_passes(measure):
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"needs second derivatives, which the model does not have .*OnceBackward"):
        score_filters(CubeNet(Once.apply), measure, class_batches(), loss_fn=loss)
    assert set(sizes) == {2}


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


class Stopping(nn.Module):
    """Divides by a number that is computed outside of the graph."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x.flatten(1)[:, :6])
        if self.how == "no_grad":
            with torch.no_grad():
                scale = h.abs().mean()
        else:
            scale = h.data.abs().mean() if self.how == "data" else h.abs().mean().detach()
        return self.b(h / scale)


def without_graph(h):
    with torch.no_grad():
        scale = h.abs().mean()
    return h / scale


class Branching(nn.Module):
    """Computes batches of many positive images by another operator."""

    def __init__(self, operator, usual=lambda h: h):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.operator, self.usual = nn.Linear(50, 6), nn.Linear(6, 3), operator, usual
        self.double()

    def forward(self, x):
        h = torch.tanh(self.first(x.flatten(1)))
        return self.head(self.operator(h) if x.mean() > 0.5 else self.usual(h))


BRANCHES = {
    "layer_norm": (lambda h: F.layer_norm(h, (6,)), lambda h: h),
    "no_grad": (without_graph, lambda h: h),
    "data": (lambda h: h / h.data.abs().mean(), lambda h: h),
    "custom": (lambda h: Cube.apply(h), lambda h: h),
    "no_grad, in the same graph": (without_graph, lambda h: h / h.new_tensor(2.0)),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_batch_that_takes_another_branch_gets_its_own_strategy(branch, monkeypatch):
    operator, usual = BRANCHES[branch]
    net, batches, taken = Branching(operator, usual).eval(), class_batches(4), []
    batches[2] = (batches[2][0] + 1, batches[2][1])

    def noting(strategy, product):
        return lambda *args: taken.append((strategy, len(args[4][0]))) or product(*args)

    for strategy, product in list(hessian_strategies.STRATEGIES.items()):
        monkeypatch.setitem(hessian_strategies.STRATEGIES, strategy, noting(strategy, product))
    first, ours = products(net, batches)
    assert first == FAST
    assert [strategy for strategy, size in taken if size == 6].count(FAST) == 3
    assert (SAFE, 6) in taken

    parameters = list(net.parameters())
    loss = sum(F.cross_entropy(net(x), y) for x, y in batches) / 4
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    theirs = torch.autograd.grad(gradients, parameters, grad_outputs=[g.detach() for g in gradients])
    for (name, _), product in zip(net.named_parameters(), theirs, strict=True):
        if name.endswith("weight"):
            assert largest_difference(ours[name], product) < 1e-9, name


def test_a_branch_that_can_be_differentiated_only_once_is_refused():
    batches = class_batches(4)
    batches[2] = (batches[2][0] + 1, batches[2][1])
    with pytest.raises(ValueError, match=r"needs second derivatives, which the model does not have .*OnceBackward"):
        score_filters(Branching(Once.apply), "grasp", batches, balanced=False)


def test_an_operator_without_second_derivative_is_named():
    def loss(model, batch):
        return F.multi_margin_loss(model(batch[0]), batch[1])

    with pytest.raises(
        ValueError, match=r"needs second derivatives, which the model does not have: .*multi_margin_loss"
    ):
        score_filters(mixed(), "grasp", class_batches(), loss_fn=loss)


@pytest.mark.parametrize("how", ["no_grad", "data", "detach"])
def test_computations_outside_of_the_graph_are_constants(how):
    torch.manual_seed(0)
    net = Stopping(how).double().eval()
    batches = [(x.double(), y) for x, y in class_batches()]
    scores = score_filters(net, "grad_preserve", batches, balanced=False)
    loss = loss_function(None, None, 1.0)
    tensors = [net.a.weight, net.b.weight]
    mean = sum(loss(net, b) * len(b[0]) for b in batches) / sum(len(b[0]) for b in batches)
    gradients = torch.autograd.grad(mean, list(net.parameters()), create_graph=True)
    products = torch.autograd.grad(gradients, tensors, grad_outputs=[g.detach() for g in gradients])
    for name, weight, product in zip("ab", tensors, products, strict=True):
        expected = (weight * product).sum(1).abs().detach()
        assert torch.allclose(scores[name], expected, rtol=1e-9), name

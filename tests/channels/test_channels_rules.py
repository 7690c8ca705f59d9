"""Small networks, one idea each: rewritten equals masked, or the units say why not."""

import pytest
import torch
import torch.nn.functional as F
from masked_networks import compare_with_masked
from torch import nn

from gflow_pl.channels import trace_channels


class Net(nn.Module):
    """Layers by name, and a forward given as a function of the module and the input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(a, b, k=3, **settings):
    return nn.Conv2d(a, b, k, padding=k // 2, **settings)


def halves(x):
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def pooled(x):
    return x.mean((2, 3))


def net(name):
    head = nn.Linear(8, 3)
    nets = {
        "conv_norm_linear": lambda: Net(
            lambda m, x: m.h(pooled(m.n(m.a(x)).relu())), a=conv(3, 8), n=nn.BatchNorm2d(8), h=head
        ),
        "flatten": lambda: Net(lambda m, x: m.h(m.a(x).relu().flatten(1)), a=conv(3, 8), h=nn.Linear(8 * 36, 3)),
        "depthwise": lambda: Net(lambda m, x: m.h(pooled(m.d(m.a(x)))), a=conv(3, 8), d=conv(8, 8, groups=8), h=head),
        "multiplied_depthwise": lambda: Net(
            lambda m, x: m.h(pooled(m.d(m.a(x)))), a=conv(3, 4), d=conv(4, 8, groups=4), h=head
        ),
        "many_small_groups": lambda: Net(
            lambda m, x: m.h(pooled(m.d(m.a(x)))), a=conv(3, 8), d=conv(8, 8, groups=4), h=head
        ),
        "few_large_groups": lambda: Net(
            lambda m, x: m.h(pooled(m.d(m.a(x)))), a=conv(3, 16), d=conv(16, 8, groups=2), h=head
        ),
        "transposed": lambda: Net(
            lambda m, x: m.h(pooled(m.t(m.a(x)).relu())), a=conv(3, 6), t=nn.ConvTranspose2d(6, 8, 2), h=head
        ),
        "cat": lambda: Net(
            lambda m, x: m.h(pooled(torch.cat([m.a(x), m.b(x).relu()], 1))), a=conv(3, 5), b=conv(3, 3), h=head
        ),
        "chunk": lambda: Net(
            lambda m, x: m.h(pooled((lambda p, q: p * q.sigmoid())(*m.a(x).chunk(2, 1)))), a=conv(3, 16), h=head
        ),
        "glu": lambda: Net(lambda m, x: m.h(pooled(F.glu(m.a(x), 1))), a=conv(3, 16), h=head),
        "slices": lambda: Net(
            lambda m, x: m.h(pooled(halves(m.a(x))[0] - halves(m.b(x))[1])), a=conv(3, 16), b=conv(3, 16), h=head
        ),
        "shuffle": lambda: Net(
            lambda m, x: m.h(pooled((lambda y: y.view(y.shape[0], 2, -1, 6, 6).transpose(1, 2).flatten(1, 2))(m.a(x)))),
            a=conv(3, 8),
            h=head,
        ),
        "pixel_shuffle": lambda: Net(lambda m, x: m.h(pooled(F.pixel_shuffle(m.a(x), 2))), a=conv(3, 32), h=head),
        "padded_shortcut": lambda: Net(
            lambda m, x: m.h(pooled(F.pad(m.a(x), (0, 0, 0, 0, 1, 2)) + m.b(x))), a=conv(3, 5), b=conv(3, 8), h=head
        ),
        "gate": lambda: Net(
            lambda m, x: (lambda y: m.h(pooled(y * m.g(pooled(y)).sigmoid()[:, :, None, None])))(m.a(x)),
            a=conv(3, 8),
            g=nn.Linear(8, 8),
            h=head,
        ),
        "instance_norm": lambda: Net(
            lambda m, x: m.h(m.n(m.a(x)).relu().amax((2, 3))), a=conv(3, 8), n=nn.InstanceNorm2d(8, affine=True), h=head
        ),
        "group_norm_of_small_groups": lambda: Net(
            lambda m, x: m.h(pooled(m.n(m.a(x)).relu())), a=conv(3, 8), n=nn.GroupNorm(4, 8), h=head
        ),
        "prelu": lambda: Net(lambda m, x: m.h(pooled(m.p(m.a(x)))), a=conv(3, 8), p=nn.PReLU(8), h=head),
        "called_twice": lambda: Net(
            lambda m, x: m.h(m.b(m.b(m.a(pooled(x))).tanh())), a=nn.Linear(3, 8), b=nn.Linear(8, 8), h=head
        ),
        "parameters_used_directly": lambda: Net(
            lambda m, x: m.h(pooled(m.a(x) * m.scale + m.shift)),
            a=conv(3, 8),
            scale=nn.Parameter(torch.rand(8, 1, 1)),
            shift=nn.Parameter(torch.rand(1, 8, 1, 1)),
            h=head,
        ),
        "functional": lambda: Net(
            lambda m, x: m.h(pooled(F.conv2d(m.a(x), m.w, m.v))),
            a=conv(3, 8),
            w=nn.Parameter(torch.rand(8, 8, 1, 1)),
            v=nn.Parameter(torch.rand(8)),
            h=head,
        ),
        "einsum": lambda: Net(
            lambda m, x: m.h(torch.einsum("bchw,cd->bd", m.a(x), m.w)),
            a=conv(3, 6),
            w=nn.Parameter(torch.rand(6, 8)),
            h=head,
        ),
        "upsampled": lambda: Net(
            lambda m, x: m.h(pooled(F.interpolate(F.max_pool2d(m.a(x), 2), scale_factor=2, mode="bilinear"))),
            a=conv(3, 8),
            h=head,
        ),
        "dropout": lambda: Net(lambda m, x: m.h(pooled(F.dropout2d(m.a(x), 0.2, m.training))), a=conv(3, 8), h=head),
        "split_sizes": lambda: SplitSizes(),
        "buffers": lambda: Net(
            lambda m, x: m.h(pooled(m.a(x) * m.table)), a=conv(3, 8), table=nn.Buffer(torch.rand(8, 1, 1)), h=head
        ),
        "scale_of_a_kept_shape": lambda: Net(
            lambda m, x: m.h(pooled(m.s(m.a(x)).relu())), a=conv(3, 8), s=Scale(), h=head
        ),
        "lstm_neighbours": lambda: LSTMNet(),
    }
    return nets[name]() if name else sorted(nets)


class SplitSizes(nn.Module):
    """A split by sizes that the module keeps; its parts go their own ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = conv(3, 8), conv(2, 4), nn.Linear(10, 3)
        self.splits = [2, 6]

    def forward(self, x):
        left, right = torch.split(self.a(x), self.splits, 1)
        return self.h(pooled(torch.cat([self.b(left), right], 1)))


class PartlyCounted(SplitSizes):
    """The module keeps the size of one part only."""

    def __init__(self):
        super().__init__()
        self.tail = 6

    def forward(self, x):
        left, right = torch.split(self.a(x), [2, self.tail], 1)
        return self.h(pooled(torch.cat([self.b(left), right], 1)))


class Scale(nn.Module):
    """A factor per channel, made to fit by a shape that the module keeps."""

    def __init__(self):
        super().__init__()
        self.shape, self.scale = (8, 1, 1), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.scale.view(self.shape)


class StandardisedConv(nn.Conv2d):
    """Every filter's weights have mean 0 and variance 1: its inputs are merged with the kernel on the way."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


class LSTMNet(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self):
        super().__init__()
        self.a, self.r, self.b, self.h = (
            nn.Linear(3, 8),
            nn.LSTM(8, 5, batch_first=True),
            nn.Linear(5, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.h(self.b(self.r(self.a(x.mean(3).transpose(1, 2)))[0][:, -1]).relu())


@pytest.mark.parametrize("name", net(None))
def test_rewritten_equals_masked(name):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    for residual in ("remove", "expand"):
        off, change, graph, small = compare_with_masked(net(name), (x,), residual=residual)
        assert graph.groups, str(graph)
        assert all(group.inexact is None for group in graph.groups), str(graph)
        assert off < 1e-12 < 1e-3 < change
        # what the padding meets cannot shrink with the rest
        assert graph.coverage() == 1.0 or (name, residual) == ("padded_shortcut", "remove"), str(graph)
        small.train()(x.double()).sum().backward()


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda: nn.GroupNorm(2, 8), "group norm"),
        (lambda: nn.GroupNorm(1, 8), "group norm"),
        (lambda: nn.Softmax(1), "softmax"),
        (lambda: Net(lambda m, x: x * x.sigmoid().sum(1, keepdim=True)), "'sum' over"),
        (
            lambda: Net(lambda m, x: x * x.sigmoid().flatten(2).transpose(1, 2).matmul(x.cos().flatten(2)).mean()),
            "product sums",
        ),
    ],
)
def test_what_mixes_channels_is_said_to_be_inexact(norm, reason):
    make = lambda: Net(lambda m, x: m.h(pooled(m.n(m.a(x)).relu())), a=conv(3, 8), n=norm(), h=nn.Linear(8, 3))  # noqa: E731
    x = torch.randn(2, 3, 6, 6)
    off, _, graph, _ = compare_with_masked(make(), (x,), only=lambda group: True)
    assert [group.name for group in graph.groups] == ["a"]
    assert reason in graph.groups[0].inexact
    assert off > 1e-4  # it is inexact indeed
    exact = trace_channels(make(), x, exact_only=True)
    assert exact.groups == []
    assert reason in exact.frozen["a"]


def test_a_number_computed_from_the_width_makes_units_inexact():
    def forward(m, x):
        y = m.a(x).relu()
        return m.h(pooled(y / y.shape[1]))

    make = lambda: Net(forward, a=conv(3, 8), h=nn.Linear(8, 3))  # noqa: E731
    off, _, graph, _ = compare_with_masked(make(), (torch.randn(2, 3, 6, 6),), only=lambda group: True)
    assert "number that follows the width" in graph.group("a").inexact
    assert off > 1e-3
    assert trace_channels(make(), torch.randn(2, 3, 6, 6), exact_only=True).groups == []


def test_a_number_that_is_kept_leaves_units_exact():
    make = lambda: Net(lambda m, x: m.h(pooled(m.a(x).relu() / 8)), a=conv(3, 8), h=nn.Linear(8, 3))  # noqa: E731
    off, _, graph, _ = compare_with_masked(make(), (torch.randn(2, 3, 6, 6),))
    assert graph.group("a").inexact is None
    assert off < 1e-12


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda m, x: m.h(pooled(m.a(x)[:, 3:5].repeat(1, 4, 1, 1))), "slice"),
        (lambda m, x: m.h(torch.cat([pooled(m.a(x)[:, 4:]), pooled(m.a(x)[:, :4])], 1)), "slice"),
        (lambda m, x: m.h(pooled(m.a(x).view(-1, 8, 36)[:, :, None] * 1.0)), "follow"),
        (lambda m, x: m.h(pooled(m.a(x) + torch.rand(8, 1, 1))), "not known"),
        (lambda m, x: m.h(pooled(m.a(x)[:, [1, 0, 2, 3, 4, 5, 6, 7]])), "picked"),
        (lambda m, x: m.h(pooled(m.a(x).sort(1)[0])), "over the channels"),
        (lambda m, x: m.h(torch.linalg.inv(m.a(x).flatten(2)[:, :, :8]).mean(2)), "no rule"),
    ],
)
def test_what_is_not_understood_is_frozen_with_a_reason(forward, why):
    model = Net(forward, a=conv(3, 8), h=nn.Linear(8, 3))
    graph = trace_channels(model, torch.randn(2, 3, 6, 6))
    assert graph.groups == []
    assert why in graph.frozen["a"]


def test_heads_only_present_in_training_are_traced_too():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.h, self.aux = conv(3, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            y = pooled(self.a(x))
            return (self.h(y), self.aux(y)) if self.training else self.h(y)

    graph = trace_channels(Auxiliary(), torch.randn(2, 3, 6, 6))
    assert {part.tensor for part in graph.group("a").slices} == {"a.weight", "a.bias", "h.weight", "aux.weight"}
    assert graph.layers["aux"].is_output


def test_of_a_split_that_is_partly_counted_that_part_may_go():
    off, change, graph, small = compare_with_masked(PartlyCounted(), (torch.randn(2, 3, 6, 6),))
    assert off < 1e-12 < 1e-3 < change
    assert {group.name: group.size for group in graph.groups} == {"a": 6, "b": 4}
    assert "split" in graph.frozen["a"]
    assert small.tail == 3


def test_standardised_weights_let_filters_go_and_say_so_of_inputs():
    make = lambda: Net(  # noqa: E731
        lambda m, x: m.h(pooled(m.b(m.a(x)).relu())),
        a=StandardisedConv(3, 8, 3),
        b=StandardisedConv(8, 6, 3),
        h=nn.Linear(6, 3),
    )
    off, change, graph, _ = compare_with_masked(make(), (torch.randn(2, 3, 6, 6),))
    assert off < 1e-12 < 1e-3 < change
    assert graph.coverage() == 1.0
    assert "batch norm" in graph.group("a").inexact
    assert graph.group("b").inexact is None


def test_tied_weights_move_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.mid, self.again, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.again.weight = self.mid.weight

        def forward(self, x):
            return self.out(self.again(self.mid(self.up(x)).relu()))

    off, change, graph, _ = compare_with_masked(Tied(), (torch.randn(5, 3),))
    assert off < 1e-12 < 1e-3 < change
    assert graph.layers["again"].weight == "mid.weight"
    assert [(part.layer, part.votes) for part in graph.groups[0].layers] == [
        ("up", True),
        ("mid", True),
        ("again", True),
    ]


def written(into):
    def forward(m, x):
        y = m.a(x)
        into(y)
        return y

    return forward


def summing(forward):
    """A network that sums over the channels of what `forward` gives."""
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.h(forward(m, x).sum(1).flatten(1)),
        a=conv(3, 8),
        one=conv(3, 1),
        shift=nn.Parameter(torch.ones(1)),
        norm=nn.BatchNorm2d(8, affine=False),
        h=nn.Linear(36, 3),
    )


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x) + m.one(x),
        lambda m, x: m.a(x).sigmoid() * m.one(x),
        lambda m, x: m.a(x) + m.shift,
        lambda m, x: m.a(x).sigmoid() * m.shift,
        lambda m, x: m.norm(m.a(x).sigmoid()),
        lambda m, x: F.threshold(m.a(x), 0.5, 20.0),
        written(lambda y: y[:, :, 0].add_(1)),
        written(lambda y: y.flatten(2).sigmoid_()),
        written(lambda y: y[..., 0].fill_(1)),
        written(lambda y: y.__setitem__((..., 0), 1.0)),
    ],
)
def test_a_sum_over_what_removed_units_do_not_leave_zero_is_said_to_be_inexact(forward):
    off, _, graph, _ = compare_with_masked(summing(forward), (torch.randn(2, 3, 6, 6),), only=lambda group: True)
    assert off > 1e-3
    assert "'sum' over" in graph.group("a").inexact


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x) * m.one(x),
        lambda m, x: m.a(x) * m.shift,
        lambda m, x: m.norm(m.a(x)),
        lambda m, x: F.threshold(m.a(x), -0.5, 20.0),
        written(lambda y: y[:, :, 0].mul_(2)),
    ],
)
def test_a_sum_over_zeros_is_exact(forward):
    off, change, graph, _ = compare_with_masked(summing(forward), (torch.randn(2, 3, 6, 6),))
    assert off < 1e-12 < 1e-3 < change
    assert graph.group("a").inexact is None


@pytest.mark.parametrize(
    "number",
    [
        lambda y: torch.tensor(y.shape[1]),
        lambda y: torch.sqrt(torch.tensor(y.shape[1], dtype=y.dtype)),
        lambda y: torch.tensor([float(y.shape[1])], device=y.device),
        lambda y: y.new_tensor(y.shape[1]),
        lambda y: torch.full((1,), y.shape[1]),
        lambda y: y.new_full((1,), y.shape[1]),
        lambda y: torch.as_tensor([y.shape[1] if y.sum().item() else 0]),
        lambda y: torch.ones(y.shape[1]).sum(),
        lambda y: y.new_ones(y.shape).sum((1, 2, 3), keepdim=True),
        lambda y: torch.full((y.shape[1],), 2.0).norm(),
        lambda y: torch.ones(y.shape[1]) @ torch.ones(y.shape[1]),
    ],
)
def test_numbers_of_the_width_in_tensors_make_units_inexact(number):
    def forward(m, x):
        y = m.a(x).relu()
        return m.h(pooled(y / number(y)))

    off, _, graph, _ = compare_with_masked(
        Net(forward, a=conv(3, 8), h=nn.Linear(8, 3)), (torch.randn(2, 3, 6, 6),), only=lambda group: True
    )
    assert "number that follows the width" in graph.group("a").inexact
    assert off > 1e-3


@pytest.mark.parametrize(
    "number",
    [
        lambda y: torch.tensor(8),
        lambda y: torch.tensor([8.0], device=y.device),
        lambda y: y.new_tensor(8),
        lambda y: torch.full((y.shape[1], 1, 1), 8),
        lambda y: y.new_full((y.shape[1], 1, 1), 8),
        lambda y: torch.ones(8).sum(),
        lambda y: y.new_ones(y.shape[2:]).sum(),
        lambda y: torch.full((), float("nan")).nan_to_num(nan=8.0),
    ],
)
def test_numbers_in_tensors_that_are_kept_leave_units_exact(number):
    def forward(m, x):
        y = m.a(x).relu()
        return m.h(pooled(y / number(y)))

    off, change, graph, _ = compare_with_masked(
        Net(forward, a=conv(3, 8), h=nn.Linear(8, 3)), (torch.randn(2, 3, 6, 6),)
    )
    assert off < 1e-12 < 1e-3 < change
    assert graph.group("a").inexact is None


def test_a_list_of_tensors_is_no_list_of_sizes():
    def forward(m, x):
        return m.h(pooled(torch.cat(m.b(m.a(x)).split([2, 6], 1), 1)))

    model = Net(forward, a=conv(3, 5), b=conv(5, 8), h=nn.Linear(8, 3))
    model.anchors = [torch.ones(2), torch.ones(2)]
    graph = trace_channels(model, torch.randn(2, 3, 6, 6))
    assert [group.name for group in graph.groups] == ["a"]
    assert "split" in graph.frozen["b"]


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(8, 4, 4), (4, 8, 4), (8, 8, 2), (8, 16, 4)])
def test_grouped_transposed_convolutions_lose_the_same_position_of_every_group(inputs, outputs, groups):
    def make():
        torch.manual_seed(0)
        return Net(
            lambda m, x: m.h(pooled(m.t(m.a(x)))),
            a=conv(3, inputs),
            t=nn.ConvTranspose2d(inputs, outputs, 2, groups=groups),
            h=nn.Linear(outputs, 3),
        )

    x = torch.randn(2, 3, 6, 6)
    off, change, graph, small = compare_with_masked(make(), (x,), frozen="expand")
    assert off < 1e-12 < 1e-3 < change
    assert graph.coverage() == 1.0
    assert graph.group("t").size == outputs // groups
    small.train()(x.double()).sum().backward()
    assert "grouped transposed" in trace_channels(make(), x).frozen["a"]


@pytest.mark.parametrize(("least", "frozen"), [(0.0, True), (-1e9, False)])
def test_what_lies_before_a_size_that_values_decide_on_may_go(least, frozen):
    def forward(m, x):
        y = m.b(m.a(x).relu())
        score = m.score(y).flatten(1)
        picked = y.flatten(2).transpose(1, 2)[score > score.mean() + least]
        return m.h(m.c(picked).relu()).sum(0)

    torch.manual_seed(0)
    model = Net(forward, a=conv(3, 8), b=conv(8, 6), score=conv(6, 1), c=nn.Linear(6, 5), h=nn.Linear(5, 3))
    off, change, graph, _ = compare_with_masked(model, (torch.randn(2, 3, 24, 24),))
    assert off < 1e-12 < 1e-3 < change
    assert ("values decide on sizes" in graph.frozen.get("c", "")) == frozen
    assert {group.name for group in graph.groups} >= {"a"}


def picking(behind):
    """A network that picks tokens by their scores, in numbers that values decide on, and what it does with them."""

    def forward(m, x):
        y = m.a(x).relu()
        z = m.b(y)
        score = m.score(z).flatten(1)
        return behind(m, y, z.flatten(2).transpose(1, 2)[score > score.mean()])

    torch.manual_seed(0)
    return Net(forward, a=conv(3, 8), b=conv(8, 6), score=conv(6, 1), c=nn.Linear(6, 5), h=nn.Linear(5, 3))


def headed(m, picked):
    return m.h(m.c(picked).relu())


@pytest.mark.parametrize("residual", ["expand", "remove"])
@pytest.mark.parametrize(
    "behind",
    [
        lambda m, y, picked: headed(m, picked).sum(0) / y.shape[1],
        lambda m, y, picked: headed(m, picked).sum(0) * torch.ones(y.shape[1]).sum(),
        lambda m, y, picked: headed(m, picked if y.shape[1] == 8 else -picked).sum(0),
        lambda m, y, picked: headed(m, picked).sum(0)[: y.shape[1] // 2 - 1],
        lambda m, y, picked: headed(m, picked).sum(0).repeat(8).view(y.shape[1], 3).sum(0),
        lambda m, y, picked: headed(m, picked).sum(0) + torch.histc(headed(m, picked), bins=y.shape[1]).mean(),
    ],
)
def test_a_width_that_is_used_behind_a_size_that_values_decide_on_is_found(behind, residual):
    torch.manual_seed(1)
    off, _, graph, small = compare_with_masked(picking(behind), (torch.randn(2, 3, 12, 12),), residual=residual)
    assert off < 1e-12
    assert all(group.name != "a" or group.inexact is not None for group in graph.groups)
    small.train()(torch.randn(3, 3, 12, 12).double())


def test_a_width_is_found_also_where_sizes_that_values_decide_on_are_equal_by_chance():
    model = picking(lambda m, y, picked: headed(m, picked).mean(0) / y.shape[1])
    for seed in range(40):
        torch.manual_seed(seed)
        off, _, graph, _ = compare_with_masked(model, (torch.randn(2, 3, 4, 4),))
        assert off < 1e-12, seed
        assert graph.group("a").inexact is not None, seed


@pytest.mark.parametrize("depth", [3, 12])
@pytest.mark.parametrize("number", [lambda y: y.shape[1], lambda y: torch.ones(y.shape[1]).sum()])
def test_a_number_of_the_width_is_found_however_far_behind_it_is_used(number, depth):
    def forward(m, x):
        z = y = m.a(x).relu()
        for layer in m.layers:
            z = layer(z).relu()
        return m.h(pooled(z)) * number(y)

    layers = nn.ModuleList([conv(8, 8) for _ in range(depth)])
    model = Net(forward, a=conv(3, 8), layers=layers, h=nn.Linear(8, 3))
    off, _, graph, _ = compare_with_masked(model, (torch.randn(2, 3, 4, 4),))
    assert off < 1e-12
    assert "number that follows the width" in graph.group("a").inexact


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.__setitem__(0, 0.0),
        lambda w: w[:4].zero_(),
        lambda w: w[::2].fill_(3.0),
        lambda w: w[1:].add_(1),
        lambda w: w[2:].relu_().mul_(0.5),
        lambda w: w.__setitem__(torch.tensor([0, 1, 2]), 0.0),
    ],
)
def test_what_one_number_fills_is_no_longer_so_when_a_part_is_written(write):
    def forward(m, x):
        y = m.a(x).relu()
        weights = torch.ones(y.shape[1], dtype=y.dtype)
        write(weights)
        return m.h(pooled(m.b(y * weights.view(-1, 1, 1)).relu()))

    model = Net(forward, a=conv(3, 8), b=conv(8, 6), h=nn.Linear(6, 3))
    off, change, graph, _ = compare_with_masked(model, (torch.randn(2, 3, 6, 6),))
    assert off < 1e-12 < 1e-3 < change
    assert "meets a tensor whose channels are not known" in graph.frozen["a"]


@pytest.mark.parametrize(
    "use",
    [
        lambda z, width: z[:, :, width // 4 : width // 4 + 2],
        lambda z, width: z * torch.arange(width, width + 6, dtype=z.dtype),
        lambda z, width: z * torch.arange(0, 6 * width, width, dtype=z.dtype),
        lambda z, width: z * (width == 8),
        lambda z, width: z.masked_fill(torch.full((6,), width >= 8), 0.5),
        lambda z, width: z * torch.tensor([float(width)] * 100).mean(),
        lambda z, width: F.max_pool2d(z, 3, 1, 1) if width == 8 else F.max_pool2d(z, 1, 1, 0),
        lambda z, width: F.conv2d(
            z, torch.ones(6, 1, 3, 3, dtype=z.dtype), padding=width // 4, dilation=width // 4, groups=6
        ),
    ],
)
def test_numbers_of_the_width_that_show_in_no_shape_make_units_inexact(use):
    def forward(m, x):
        y = m.a(x).relu()
        return m.h(pooled(use(m.b(y), y.shape[1])))

    model = Net(forward, a=conv(3, 8), b=conv(8, 6), h=nn.Linear(6, 3))
    off, _, graph, _ = compare_with_masked(model, (torch.randn(2, 3, 6, 6),))
    assert off < 1e-12
    assert all(group.name != "a" or group.inexact is not None for group in graph.groups)

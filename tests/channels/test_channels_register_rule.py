"""`register_rule`: operators that the package does not know."""

import numpy as np
import pytest
import torch
from masked_networks import compare_with_masked
from torch import Tensor, nn

import gflow_pl
from gflow_pl.channels import register_rule, trace_channels
from gflow_pl.channels.rules.registry import RULES
from gflow_pl.common.errors import SettingsError


@torch.library.custom_op("gflow_tests::signed_root", mutates_args=())
def signed_root(x: Tensor) -> Tensor:
    """Root of the absolute value, with the sign: every element on its own."""
    return x.sign() * x.abs().sqrt()


@signed_root.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("gflow_tests::interleave", mutates_args=())
def interleave(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of two tensors in turns, and their mean over height and width; there is no fake implementation."""
    joined = torch.stack([x, y], 2).flatten(1, 2)
    return joined, joined.mean((2, 3))


@pytest.fixture(autouse=True)
def rules_are_restored():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class Rooted(nn.Module):
    """conv, custom operator, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, x):
        return self.h(signed_root(self.a(x)).mean((2, 3)))


class Interleaved(nn.Module):
    """Two convs of different width in one custom operator with two outputs; both are read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.c, self.h = nn.Conv2d(8, 6, 3), nn.Linear(14, 2)

    def forward(self, x):
        joined, means = interleave(self.a(x).relu(), self.b(x).relu())
        return self.h(torch.cat([self.c(joined).relu().mean((2, 3)), means], 1))


def signed_root_rule(op) -> None:
    x = op.args[0]
    op.set_labels(op.output, op.info(x).labels, op.info(x).zero_dims)


def interleave_rule(op) -> None:
    x, y = op.info(op.arg(0, "x")), op.info(op.arg(1, "y"))
    op.match(x.labels[1], y.labels[1], "interleaved with channels that cannot change")
    channels = None if x.labels[1] is None else np.stack([x.labels[1], y.labels[1]], 1).reshape(-1)
    joined, means = op.outputs
    op.set_labels(joined, [x.labels[0], channels, *x.labels[2:]], zero_dims={1})
    op.set_labels(means, [x.labels[0], channels], zero_dims={1})


@pytest.mark.parametrize("network", [Rooted, Interleaved])
def test_without_a_rule_the_layers_around_an_operator_are_frozen(network) -> None:
    graph = trace_channels(network(), torch.zeros(2, 3, 6, 6))
    assert "a" not in {part.layer for group in graph.groups for part in group.layers}
    assert "gflow_tests::" in graph.frozen["a"]
    assert "register_rule" in graph.frozen["a"]


@pytest.mark.parametrize(
    ("network", "operator", "rule"),
    [
        (Rooted, "gflow_tests::signed_root", signed_root_rule),
        (Interleaved, "gflow_tests::interleave", interleave_rule),
    ],
)
def test_with_a_rule_the_layers_around_an_operator_are_pruned_exactly(network, operator, rule) -> None:
    assert gflow_pl.register_rule(operator)(rule) is rule
    torch.manual_seed(0)
    off, change, graph, _ = compare_with_masked(network(), (torch.randn(2, 3, 6, 6),))
    assert graph.coverage() == 1.0, str(graph)
    assert all(group.inexact is None for group in graph.groups), str(graph)
    assert off < 1e-12 < 1e-3 < change


def test_a_rule_may_freeze_its_operands_and_call_them_inexact() -> None:
    def freezing(op) -> None:
        op.freeze(op.info(op.args[0]).labels[1], "a root of all channels")
        op.set_labels(op.output, [None] * op.output.ndim)

    def inexact(op) -> None:
        signed_root_rule(op)
        op.mark_inexact(op.info(op.args[0]).labels[1], "a root of all channels")

    register_rule("gflow_tests::signed_root", freezing)
    assert trace_channels(Rooted(), torch.zeros(2, 3, 6, 6)).frozen["a"] == "a root of all channels"
    register_rule("gflow_tests::signed_root", inexact)
    assert trace_channels(Rooted(), torch.zeros(2, 3, 6, 6)).group("a").inexact == "a root of all channels"


def test_a_rule_that_does_not_fit_the_operator_freezes_the_layers() -> None:
    def halving_rule(op) -> None:
        # Claims that the operator puts out one channel for every two.
        op.set_labels(op.output, [None, np.repeat(op.info(op.args[0]).labels[1][:4], 2), None, None])

    register_rule("gflow_tests::signed_root", halving_rule)
    graph = trace_channels(Rooted(), torch.zeros(2, 3, 6, 6))
    assert not graph.groups
    assert "a" in graph.frozen


def failing(op) -> None:
    raise IndexError("no such dim")


def silent(op) -> None:
    pass


def short(op) -> None:
    op.set_labels(op.output, op.info(op.args[0]).labels[:2])


def too_many(op) -> None:
    op.set_labels(op.output, [None, np.zeros(9, np.int64), None, None])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (failing, "'gflow_tests::signed_root' failed: IndexError: no such dim"),
        (silent, "'gflow_tests::signed_root' must call set_labels for output 0"),
        (short, r"has shape \(2, 8, 4, 4\); it set \[None, 8\] labels"),
        (too_many, r"has shape \(2, 8, 4, 4\); it set \[None, 9, None, None\] labels"),
    ],
)
def test_a_faulty_rule_is_an_error_that_names_its_operator(rule, message: str) -> None:
    register_rule("gflow_tests::signed_root", rule)
    with pytest.raises(SettingsError, match=message):
        trace_channels(Rooted(), torch.zeros(2, 3, 6, 6))


@pytest.mark.parametrize("name", ["signed_root", "gflow_tests::no_such_operator", "gflow_tests::", "", "::"])
def test_a_rule_of_an_operator_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="there is no operator"):
        register_rule(name, signed_root_rule)


def test_an_operator_of_torch_may_get_a_rule() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    register_rule("aten::relu", lambda op: op.set_labels(op.output, [None] * op.output.ndim))
    assert "0" in trace_channels(net, torch.zeros(2, 3)).frozen

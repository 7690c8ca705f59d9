"""Updates of a whole list of tensors at once: filter i of the teacher belongs to filter i of the network."""

import copy

import pytest
import torch
from masked_networks import masked_network, random_plan
from torch import nn

from gflow_pl.channels import trace_channels
from gflow_pl.surgery import rewrite

UPDATES = {
    "lerp": lambda t, p: torch._foreach_lerp_(t, p, 0.1),
    "mul and add": lambda t, p: (torch._foreach_mul_(t, 0.9), torch._foreach_add_(t, p, alpha=0.1)),
    "copy": lambda t, p: torch._foreach_copy_(t, p),
    "in new tensors": lambda t, p: torch._foreach_copy_(t, torch._foreach_add(torch._foreach_mul(t, 0.9), p)),
    "one factor for each": lambda t, p: (torch._foreach_mul_(t, [0.9] * len(t)), torch._foreach_add_(t, p)),
    "addcmul": lambda t, p: torch._foreach_addcmul_(t, p, p, 0.1),
}


class WithTeacher(nn.Module):
    def __init__(self, update) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8))
        self.head = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 8))
        self.teacher, self.update = copy.deepcopy(self.net).requires_grad_(False), update

    def forward(self, x):
        with torch.no_grad():
            self.update(list(self.teacher.parameters()), list(self.net.parameters()))
        return (self.head(self.net(x)) - self.teacher(x)).square().mean((0,))


@pytest.mark.parametrize("update", UPDATES)
def test_a_teacher_that_is_updated_as_a_list_is_cut_along(update) -> None:
    torch.manual_seed(0)
    model = WithTeacher(UPDATES[update]).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    graph = trace_channels(model, x)
    (group,) = [group for group in graph.groups if any(part.layer == "net.0" for part in group.layers)]
    assert {part.layer for part in group.layers} == {"net.0", "teacher.0"}
    assert not any("no rule" in reason for reason in graph.frozen.values())

    plan, pruned = random_plan(graph), copy.deepcopy(model)
    masked = masked_network(model, graph, plan)
    rewrite(pruned, graph, plan)
    for _ in range(2):  # the second output is that of the updated teacher
        expected = masked(x)
        assert (pruned(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert pruned.teacher[0].out_features == pruned.net[0].out_features == 5


def test_numbers_that_are_added_to_a_list_of_weights_are_not_exact() -> None:
    """A masked filter would not stay zero."""
    model = WithTeacher(lambda t, p: torch._foreach_add_(t, 1.0))
    graph = trace_channels(model, torch.randn(4, 6))
    (group,) = [group for group in graph.groups if any(part.layer == "teacher.0" for part in group.layers)]
    assert group.inexact is not None

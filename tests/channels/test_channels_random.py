"""Random networks of convolutions, sums, products, concatenations and splits: the pruned equals the masked network."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masked_networks import compare_with_masked
from torch import nn

WIDTHS = (4, 6, 8)
STEPS = ("conv", "norm", "depthwise", "grouped", "add", "mul", "cat", "chunk", "relu", "sigmoid", "gate", "transposed")


class RandomNet(nn.Module):
    """A list of steps; every step reads tensors of earlier steps and adds one tensor."""

    def __init__(self, steps):
        super().__init__()
        widths, self.plan = [3], []
        self.layers = nn.ModuleList()
        for kind, a, b, width in steps:
            a %= len(widths)
            b %= len(widths)
            layer, made = self._step(kind, widths, a, b, width)
            if made is not None:
                self.layers.append(layer)
                self.plan.append((kind, a, b))
                widths.append(made)
        self.head = nn.Linear(widths[-1], 2)

    @staticmethod
    def _step(kind, widths, a, b, width):
        wide = widths[a]
        if kind == "conv":
            return nn.Conv2d(wide, width, 3, padding=1), width
        if kind == "transposed":
            return nn.ConvTranspose2d(wide, width, 3, padding=1), width
        if kind == "norm":
            return nn.BatchNorm2d(wide), wide
        if kind == "depthwise":
            return nn.Conv2d(wide, wide, 3, padding=1, groups=wide), wide
        if kind == "grouped":
            return (nn.Conv2d(wide, 2 * width, 1, groups=2), 2 * width) if wide % 2 == 0 else (None, None)
        if kind in ("add", "mul"):
            return (nn.Identity(), wide) if wide == widths[b] else (None, None)
        if kind == "cat":
            return nn.Identity(), wide + widths[b]
        if kind == "chunk":
            return (nn.Identity(), wide // 2) if wide % 2 == 0 else (None, None)
        if kind == "gate":
            return nn.Linear(wide, wide), wide
        return nn.Identity(), wide

    def forward(self, x):
        made = [x]
        for layer, (kind, a, b) in zip(self.layers, self.plan, strict=True):
            x, y = made[a], made[b]
            if kind == "add":
                z = x + y
            elif kind == "mul":
                z = x * y.tanh()
            elif kind == "cat":
                z = torch.cat([x, y], 1)
            elif kind == "chunk":
                left, right = x.chunk(2, 1)
                z = left - right
            elif kind == "gate":
                z = x * layer(x.mean((2, 3))).sigmoid()[:, :, None, None]
            elif kind in ("relu", "sigmoid"):
                z = getattr(x, kind)()
            else:
                z = layer(x)
            made.append(z)
        return self.head(made[-1].mean((2, 3)))


steps = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 30), st.integers(0, 30), st.sampled_from(WIDTHS)),
    min_size=3,
    max_size=12,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps, residual=st.sampled_from(["expand", "remove"]), seed=st.integers(0, 3))
def test_random_pruned_networks_equal_their_masked_networks(steps, residual, seed):
    torch.manual_seed(seed)
    # Steps read one of the last few tensors, so that most tensors are used.
    model = RandomNet([(kind, i - a % 3, i - b % 4, width) for i, (kind, a, b, width) in enumerate(steps)])
    off, _, graph, small = compare_with_masked(model, (torch.randn(2, 3, 5, 5),), residual=residual, seed=seed)
    assert off < 1e-10
    assert not any("follow" in why for why in graph.frozen.values()), str(graph)  # no size here is hard-coded
    assert set(graph.frozen) | {part.layer for group in graph.groups for part in group.layers} == set(graph.layers)
    small.train()(torch.randn(2, 3, 5, 5, dtype=torch.float64)).sum().backward()

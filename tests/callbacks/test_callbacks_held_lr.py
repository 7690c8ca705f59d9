"""The learning rate that is held during warm-up and rounds."""

import pytest
import torch
from torch import nn

from gflow_pl.callbacks.lightning.held_lr import HeldLearningRate


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_only_optimizer_steps_use_the_held_learning_rate(optimizer_class) -> None:
    def run(held: float | None) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).double()
        optimizer = optimizer_class(layer.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        steps = 0
        if held is not None:
            HeldLearningRate(held, [optimizer], lambda: steps < 2)
        rates = []
        for steps in range(4):  # noqa: B007 - read by the lambda
            optimizer.zero_grad()
            layer(torch.ones(1, 3).double()).sum().backward()
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        return rates, layer.weight.detach().clone()

    plain_rates, plain = run(None)
    held_rates, held = run(0.01)
    assert held_rates == plain_rates == [0.5, 0.25, 0.125, 0.0625]
    assert not torch.equal(plain, held)

    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    optimizer = optimizer_class(layer.parameters(), lr=0.01)
    for rate in (0.01, 0.01, 0.125, 0.0625):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        layer(torch.ones(1, 3).double()).sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight, held)

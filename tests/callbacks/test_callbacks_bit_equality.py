"""Trainer and PruningCallback equal a plain loop that builds everything anew in the smaller shape, to the last bit."""

import copy
import itertools
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import images, loader, trainer
from two_convs import slice_tensor, sliced_optimizer, two_convs

from gflow_pl import PruningCallback

CUT_EPOCH, EPOCHS, LR = 2, 4, 0.05


OPTIMIZERS = {
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR / 10),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=LR / 10, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=LR / 10, amsgrad=True),
}
SCHEDULERS = {
    "none": None,
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3], gamma=0.3),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=EPOCHS),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
}


class Module(pl.LightningModule):
    """A user's module; with `keeps`, it stores the last loss and its autograd graph."""

    def __init__(self, net: nn.Module, optimizer: str, scheduler: str, keeps: bool = False) -> None:
        super().__init__()
        self.net, self.names, self.keeps, self.last_loss = net, (optimizer, scheduler), keeps, None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.keeps:
            self.last_loss = loss
        return loss

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.names[0]](self.parameters())
        make = SCHEDULERS[self.names[1]]
        return optimizer if make is None else ([optimizer], [make(optimizer)])


def filters_that_stay(*weights: Tensor, gone: int) -> list[Tensor]:
    """Return the positions of the filters that stay in each conv without the `gone` filters of smallest L2 norm."""
    norms = [weight.detach().flatten(1).norm(dim=1) for weight in weights]
    limit = torch.cat(norms).sort().values[gone]
    return [(norm >= limit).nonzero().flatten() for norm in norms]


def anew(schedule, make_scheduler, optimizer):
    """Return a new scheduler on a new optimizer, in the state of the old one."""
    if schedule is None:
        return None
    rates = [group["lr"] for group in optimizer.param_groups]
    fresh = make_scheduler(optimizer)
    fresh.load_state_dict(schedule.state_dict())
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # making a scheduler takes its first step
    return fresh


def bare_loop(net: nn.Module, optimizer: str, scheduler: str, clip: float | None) -> tuple[nn.Module, list]:
    """Train the reference: without a Trainer or a rewrite, with a new network, optimizer and scheduler at the cut."""
    make, make_scheduler = OPTIMIZERS[optimizer], SCHEDULERS[scheduler]
    opt = make(net.parameters())
    schedule = make_scheduler(opt) if make_scheduler else None
    data = loader(images(64))
    for epoch in range(EPOCHS):
        if epoch == CUT_EPOCH:
            first, second = filters_that_stay(net[0].weight, net[3].weight, gone=7)
            old, net = net.state_dict(), two_convs(len(first), len(second))
            net.load_state_dict({name: slice_tensor(name, value, first, second) for name, value in old.items()})
            opt = sliced_optimizer(opt, net, make, first, second)
            schedule = anew(schedule, make_scheduler, opt)
        data.sampler.set_epoch(epoch)
        for x, y in data:
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            opt.step()
        if schedule is not None:
            schedule.step()
    return net, opt


def lightning(folder, net: nn.Module, optimizer: str, scheduler: str, clip: float | None, **options):
    module = Module(net, optimizer, scheduler, **options)
    pruning = PruningCallback("magnitude", fraction=0.5, epochs=[CUT_EPOCH], keep_momentum=True, num_samples=16)
    run = trainer(
        folder, max_epochs=EPOCHS, callbacks=[pruning], gradient_clip_val=clip, enable_checkpointing=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    run.fit(module, loader(images(64)))
    return module, run.optimizers[0]


def assert_bit_equal(net: nn.Module, optimizer, reference: nn.Module, wanted) -> None:
    state, expected = net.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    for name in state:
        assert state[name].shape == expected[name].shape, name
        assert torch.equal(state[name], expected[name]), name
    compared = 0
    for one, two in zip(net.parameters(), reference.parameters(), strict=True):
        assert optimizer.state[one].keys() == wanted.state[two].keys()
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, wanted.state[two][key]), key
            compared += 1
    assert compared >= len(state) // 2
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in wanted.param_groups]


@pytest.mark.parametrize("clip", [None, 0.5], ids=["no clip", "clip"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_pruned_fit_equals_a_loop_that_builds_everything_anew(optimizer, clip, tmp_path) -> None:
    for seed, scheduler in itertools.product((0, 1), SCHEDULERS):
        torch.manual_seed(seed)
        start = two_convs()
        reference, wanted = bare_loop(copy.deepcopy(start), optimizer, scheduler, clip)
        module, got = lightning(tmp_path, copy.deepcopy(start), optimizer, scheduler, clip)
        assert module.net[0].out_channels + module.net[3].out_channels == 7
        assert_bit_equal(module.net, got, reference, wanted)


@pytest.mark.parametrize("optimizer", ["SGD nesterov", "AdamW"])
def test_an_autograd_graph_that_the_module_stores_changes_nothing(optimizer, tmp_path) -> None:
    torch.manual_seed(3)
    start = two_convs()
    reference, wanted = bare_loop(copy.deepcopy(start), optimizer, "MultiStepLR", None)
    module, got = lightning(tmp_path, copy.deepcopy(start), optimizer, "MultiStepLR", None, keeps=True)
    assert module.last_loss.grad_fn is not None
    assert_bit_equal(module.net, got, reference, wanted)


class Tied(nn.Module):
    """Two convs that share one weight, on the image and its mirror image."""

    def __init__(self, a: int = 8) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, a, 3), nn.Conv2d(3, a, 3)
        self.two.weight = self.one.weight
        self.head = nn.Linear(a, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.one(x) + self.two(x.flip(-1)))
        return self.head(features.mean(dim=(2, 3)))


@pytest.mark.parametrize("optimizer", ["SGD nesterov", "AdamW fused"])
def test_a_tied_weight_stays_tied_and_equal(optimizer, tmp_path) -> None:
    torch.manual_seed(4)
    start = Tied()
    module, got = lightning(tmp_path, copy.deepcopy(start), optimizer, "MultiStepLR", 0.5)
    net = module.net
    assert net.one.weight is net.two.weight

    reference, make = start, OPTIMIZERS[optimizer]
    opt = make(reference.parameters())
    schedule = SCHEDULERS["MultiStepLR"](opt)
    data = loader(images(64))
    for epoch in range(EPOCHS):
        if epoch == CUT_EPOCH:
            # Both convs vote with the one weight: their 16 filters are 8 units, half of which go.
            (stay,) = filters_that_stay(reference.one.weight, gone=4)
            small, old, state = Tied(len(stay)), reference.state_dict(), copy.deepcopy(opt.state_dict())
            dims = {name: 1 if name == "head.weight" else 0 for name in old if name != "head.bias"}
            small.load_state_dict({k: v.index_select(dims[k], stay) if k in dims else v for k, v in old.items()})
            for (name, _), entries in zip(reference.named_parameters(), state["state"].values(), strict=True):
                for key, value in entries.items():
                    if name in dims and value.ndim:
                        entries[key] = value.index_select(dims[name], stay)
            reference, opt = small, make(small.parameters())
            opt.load_state_dict(state)
            schedule = anew(schedule, SCHEDULERS["MultiStepLR"], opt)
        data.sampler.set_epoch(epoch)
        for x, y in data:
            opt.zero_grad()
            F.cross_entropy(reference(x), y).backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            opt.step()
        schedule.step()
    assert net.one.out_channels == net.two.out_channels == net.head.in_features == 4
    assert_bit_equal(net, got, reference, opt)

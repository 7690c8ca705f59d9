"""Tracked scores of derived weights (parametrizations and hooks), their messages, and two ranks."""

import logging
import warnings
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset

from gflow_pl import PruningCallback
from gflow_pl.importance.derived_weights import DerivedWeightGradients

KINDS = pytest.mark.parametrize("kind", ["parametrizations", "hooks"])
ALPHA, LR, CLIP = 0.7, 0.05, 0.05


class Normed(nn.Module):
    """A weight norm on a layer that is pruned, a spectral norm on one that is called twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weighted, self.plain = nn.Linear(5, 8), nn.Linear(8, 8)
        self.twice, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        norms = nn.utils if kind == "hooks" else parametrizations
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old weight norm is deprecated
            norms.weight_norm(self.weighted)
            norms.spectral_norm(self.twice)
        self.double()

    def forward(self, x):
        x = torch.tanh(self.plain(torch.tanh(self.weighted(x))))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


class Module(pl.LightningModule):
    """Trains `Normed`; a `fused` optimizer unscales gradients within its step."""

    def __init__(self, kind: str, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.fused = Normed(kind), fused

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9, fused=self.fused)


class Recorder(PruningCallback):
    """Keeps the scores of every round."""

    def select(self, graph, scores):
        self.__dict__.setdefault("seen", []).append({name: vector.clone() for name, vector in scores.items()})
        return super().select(graph, scores)


def data(number: int = 40, size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, 5, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.arange(number) % 4), batch_size=size)


def fit(module, callback, batches, folder, **options) -> None:
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    pl.Trainer(callbacks=[callback], **{**settings, **options}).fit(module, batches)


NAMES = ("weighted", "plain", "twice", "head")


def loss_and_weights(net: Normed, batch) -> tuple[torch.Tensor, dict[str, list]]:
    """The loss of a batch, and all weights in its graph: a layer that is called twice has two."""
    seen: dict[str, list] = {name: [] for name in NAMES}
    handles = []
    for name in NAMES:
        layer = getattr(net, name)
        if parametrize.is_parametrized(layer):
            note = lambda _m, _x, weight, name=name: seen[name].append(weight)  # noqa: E731
            handles.append(layer.parametrizations.weight.register_forward_hook(note))
        else:
            handles.append(layer.register_forward_hook(lambda m, *_, name=name: seen[name].append(m.weight)))
    loss = F.cross_entropy(net(batch[0]), batch[1])
    for handle in handles:
        handle.remove()
    return loss, seen


def by_hand(net, batches, *, accumulate, clip, order, steps, skip=0):
    """The average of sum |theta g| over the last steps of one epoch, in plain PyTorch."""
    optimizer = torch.optim.SGD(net.train().parameters(), lr=LR, momentum=0.9)
    batches, average = list(batches)[skip:], {}
    scored = []
    for first in range(0, len(batches), accumulate):
        sums: dict[str, torch.Tensor] = {}
        for batch in batches[first : first + accumulate]:
            loss, weights = loss_and_weights(net, batch)
            for name, found in weights.items():
                gradients = torch.autograd.grad(loss / accumulate, found, retain_graph=True)
                sums[name] = sums.get(name, 0) + sum(gradients)
            (loss / accumulate).backward()
        before = values_of(net)
        nn.utils.clip_grad_norm_(net.parameters(), clip if clip else float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        weights = before if order == "formula" else values_of(net)
        scored.append({name: (weights[name] * gradient).abs().sum(1) for name, gradient in sums.items()})
    for scores in scored[-steps:]:
        average = {name: ALPHA * new + (1 - ALPHA) * average.get(name, 0) for name, new in scores.items()}
    return {f"net.{name}": vector for name, vector in average.items()}


def values_of(net: Normed) -> dict[str, torch.Tensor]:
    """Return the weights derived from the current parameters, computed in a copy: hooks compute them in a pass."""
    duplicate = Normed("hooks" if "weight_v" in dict(net.weighted.named_parameters()) else "parametrizations").eval()
    duplicate.load_state_dict(net.state_dict())
    with torch.no_grad():
        duplicate(torch.zeros(1, 5, dtype=torch.float64))
        return {name: getattr(duplicate, name).weight.clone() for name in NAMES}


def assert_same(ours, theirs, tolerance=1e-9) -> None:
    assert ours.keys() == theirs.keys()
    for name, vector in theirs.items():
        assert (ours[name] - vector).abs().max() <= tolerance * vector.abs().max(), name


@pytest.mark.parametrize("order", ["formula", "published"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, CLIP)])
@KINDS
def test_tracked_scores_of_derived_weights_are_the_average_of_a_plain_loop(kind, accumulate, clip, order, tmp_path):
    module, batches = Module(kind), data()
    duplicate = Module(kind)
    pruning = Recorder("loss", fraction=0.3, track=True, track_batches=2, alpha=ALPHA, track_order=order)
    options = {"max_epochs": 2, "precision": "64-true", "accumulate_grad_batches": accumulate}
    fit(module, pruning, batches, tmp_path, gradient_clip_val=clip, **options)
    expected = by_hand(duplicate.net, batches, accumulate=accumulate, clip=clip, order=order, steps=2)
    assert_same(pruning.seen[0], expected)
    assert pruning.rows[0]["filters_removed"] > 0
    assert not any(m._forward_hooks for m in module.modules()), "the hooks are still there"


@KINDS
def test_hooks_are_removed_after_a_step_that_failed(kind, tmp_path):
    class Failing(Module):
        def on_after_backward(self):
            raise RuntimeError("enough")

    module = Failing(kind)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    with pytest.raises(RuntimeError, match="enough"):
        fit(module, Recorder("loss", fraction=0.3, track=True), data(), tmp_path, max_epochs=2)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()] == before
    assert not torch.nn.modules.module._global_forward_hooks


class ScalerOnly(MixedPrecision):
    """A gradient scaler without autocast, so that its steps can be compared."""

    def forward_context(self):
        return nullcontext()


@pytest.mark.parametrize("fused", [False, True])
@KINDS
def test_tracked_gradients_are_unscaled_also_where_the_optimizer_unscales_within_its_step(kind, fused, tmp_path):
    module, batches = Module(kind, fused), data()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)  # another scale every two steps
    pruning = Recorder("loss", fraction=0.3, track=True, track_batches=3, alpha=ALPHA)
    fit(module, pruning, batches, tmp_path, max_epochs=2, plugins=[ScalerOnly("16-mixed", device="cpu", scaler=scaler)])
    assert scaler.get_scale() > 2.0**10
    duplicate = Module(kind)
    assert_same(pruning.seen[0], by_hand(duplicate.net, batches, accumulate=1, clip=None, order="formula", steps=3))


@pytest.mark.filterwarnings("ignore:Asked to remove")
def test_a_module_that_controls_its_steps_is_tracked_without_its_derived_weights(tmp_path, caplog):
    class Skipping(Module):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer.step(closure=optimizer_closure) if batch_idx % 2 else optimizer_closure()

    pruning = Recorder("loss", fraction=0.3, track=True)
    with (
        caplog.at_level(logging.WARNING, logger="gflow_pl"),
        pytest.warns(UserWarning, match=r"Kept whole, because none of their layers is scored: net.weighted"),
    ):
        fit(Skipping("parametrizations"), pruning, data(), tmp_path, max_epochs=2)
    assert set(pruning.seen[0]) == {"net.plain", "net.head"}
    assert "net.weighted, net.twice" in caplog.text


def initial_by_hand(net: Normed, start: dict[str, torch.Tensor], kept: list[int]) -> dict[str, torch.Tensor]:
    """The initial weights of the filters that are left; that of a spectral norm by its current vectors."""
    parts = {name.removeprefix("weighted."): tensor for name, tensor in start.items() if name.startswith("weighted.")}
    length = next(tensor for name, tensor in parts.items() if name.endswith(("_g", "original0")))[kept]
    direction = next(tensor for name, tensor in parts.items() if name.endswith(("_v", "original1")))[kept]
    state = net.twice.state_dict()
    u, v = (next(tensor for name, tensor in state.items() if name.endswith(end)) for end in ("_u", "_v"))
    original = next(
        t for name, t in start.items() if name.startswith("twice.") and name.endswith(("_orig", "original"))
    )
    return {
        "weighted": length * direction / direction.norm(dim=1, keepdim=True),
        "plain": start["plain.weight"][:, kept],
        "twice": original / (u @ original @ v),
        "head": start["head.weight"],
    }


@KINDS
def test_the_distance_of_derived_weights_is_from_their_initial_values_in_every_round(kind, tmp_path):
    start = {name: tensor.clone() for name, tensor in Module(kind).net.state_dict().items()}
    module, batches, expected = Module(kind), data(), []

    class ByHand(Recorder):
        def select(self, graph, scores):
            self.kept = list(graph.groups[0].kept)
            assert graph.groups[0].name == "net.weighted"
            loss, weights = loss_and_weights(module.net.eval(), batches.dataset.tensors)
            module.net.train()
            initial, found = initial_by_hand(module.net, start, self.kept), {}
            for name, tensors in weights.items():
                gradient, weight = sum(torch.autograd.grad(loss, tensors, retain_graph=True)), tensors[0].detach()
                found[f"net.{name}"] = ((weight - initial[name]).abs() * (weight * gradient).abs()).sum(1)
            expected.append(found)
            return super().select(graph, scores)

    settings = {"bias": "distance_from_init", "num_samples": 40, "ignore": ["net.twice"]}  # by hand at full size
    pruning = ByHand("loss", fraction=0.25, rounds=2, **settings)
    fit(module, pruning, batches, tmp_path, max_epochs=3, precision="64-true")
    assert len(pruning.seen) == len(expected) == 2
    for ours, theirs in zip(pruning.seen, expected, strict=True):
        assert_same(ours, theirs)
    assert len(pruning.kept) < 8, "the second round is one of a network that was cut"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_cost_of_tracking_is_logged_once_and_by_one_rank(rank, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "global_rank", rank)
    pruning = PruningCallback("grad_preserve", fraction=0.5, rounds=2, track=True, track_batches=2, num_samples=8)
    with caplog.at_level(logging.INFO, logger="gflow_pl"):
        fit(Module("parametrizations"), pruning, data(), tmp_path, max_epochs=3, precision="64-true")
    assert len(pruning.rows) == 2
    assert caplog.text.count("a Hessian-gradient product a tracked step") == 1 - rank


def average(tensor):
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def backward_of_half(net: Normed, rank: int) -> DerivedWeightGradients:
    """Run backward on half of the data. Rank 1 does not use the layer `twice`; no rank uses `unused`."""
    x, labels = data().dataset.tensors
    own = slice(20 * rank, 20 * rank + 20)
    computed = DerivedWeightGradients(net.eval(), ["weighted.weight", "twice.weight", "unused.weight", "head.weight"])
    computed.start()
    hidden = net.plain(torch.tanh(net.weighted(x[own])))
    F.cross_entropy(net.head(hidden if rank else net.twice(hidden)), labels[own]).backward()
    computed.stop()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)  # what a reduction leaves
    return computed


def normed_with_one_more() -> Normed:
    net = Module("parametrizations").net
    net.unused = parametrizations.weight_norm(nn.Linear(8, 8).double())
    return net


def take_on_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = normed_with_one_more()
    taken = backward_of_half(net, rank).collect({id(p) for p in net.parameters()}, average)
    torch.save(taken, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_average_the_gradients_of_derived_weights_including_weights_that_only_one_of_them_uses(tmp_path):
    mp.spawn(take_on_rank, args=(str(tmp_path),), nprocs=2)
    alone = []
    for rank in (0, 1):
        net = normed_with_one_more()
        alone.append(backward_of_half(net, rank).collect({id(p) for p in net.parameters()}, None))
    assert set(alone[0]) == {"weighted.weight", "twice.weight"}
    assert set(alone[1]) == {"weighted.weight"}
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert set(found) == {"weighted.weight", "twice.weight"}
        assert torch.allclose(found["weighted.weight"], (alone[0]["weighted.weight"] + alone[1]["weighted.weight"]) / 2)
        assert torch.allclose(found["twice.weight"], alone[0]["twice.weight"] / 2)


def test_a_graph_compiled_while_gradients_are_collected_adds_no_zeros():
    torch._dynamo.reset()
    net = Module("parametrizations").net.eval()
    x, compiled = data().dataset.tensors[0], torch.compile(net, backend="eager")
    computed = DerivedWeightGradients(net, ["weighted.weight"])
    computed.start()
    compiled(x).sum().backward()
    computed.stop()
    compiled(x).sum().backward()
    assert computed.collect({id(p) for p in net.parameters()}, None) == {}

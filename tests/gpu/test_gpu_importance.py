"""Scores on the GPU: they equal those of the CPU, and scoring neither synchronizes nor needs more memory for more
batches.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
from comparisons import assert_identical
from golden_recipe import golden_images, load_golden_weights
from gpu_device import DEVICE, ON_CUDA, distance, moved, only_cuda
from importance_nets import class_batches, mixed
from masked_networks import randomize_parameters
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gflow_pl import models
from gflow_pl.common.nested import map_tensors
from gflow_pl.importance import Tracker, measure_names, resolve_measure, score, score_filters
from gflow_pl.importance.gradients import loss_function
from gflow_pl.importance.hessian import HessianProducts, second_order_kernels
from gflow_pl.importance.hessian_strategies import STRATEGIES
from gflow_pl.importance.layers import find_layers, unique_refs
from gflow_pl.importance.scoring_mode import scoring_mode
from gflow_pl.tasks import ImageClassifier
from gflow_pl.values import Scores

BY_NAME = pytest.mark.parametrize("measure", measure_names())
HESSIAN = [name for name in measure_names() if resolve_measure(name).needs_hessian]
WITH_BATCHES = [name for name in measure_names() if resolve_measure(name).needs_gradients]


def shufflenet():
    torch.manual_seed(0)
    return randomize_parameters(torchvision.models.shufflenet_v2_x0_5(num_classes=10).double())


def images(number=20, side=32, dtype=torch.float64):
    """Batches of ten images, one of each class, on the CPU."""
    x, y = golden_images()[:number].to(dtype), torch.arange(number) % 10
    x = F.interpolate(x, size=side) if side != 32 else x
    return list(zip(x.split(10), y.split(10), strict=True))


NETWORKS = {
    "every kind of layer": (mixed, class_batches),
    "resnet56": (lambda: load_golden_weights(models.resnet56(10), "resnet56"), images),
    "shufflenet_v2_x0_5": (shufflenet, lambda: images(side=64)),
}


def initial_weights(net):
    """Weights that differ from those of the network, as weights before training do."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in net.named_parameters()
    }


def assert_same_scores(ours, theirs, limit=1e-6):
    assert ours.keys() == theirs.keys()
    distances = {layer: distance(ours[layer], vector) for layer, vector in theirs.items()}
    worst = max(distances, key=distances.get)
    assert distances[worst] < limit, f"scores of '{worst}' differ by {distances[worst]:.1e} of the largest score"


def generator_states():
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if ON_CUDA else [])]


@pytest.mark.parametrize("name", NETWORKS)
@BY_NAME
def test_scores_equal_those_of_the_cpu(measure, name):
    build, batches = NETWORKS[name]
    if name == "shufflenet_v2_x0_5" and measure not in HESSIAN:
        pytest.skip("this network tests the operators of Hessian-gradient products")
    if measure == "random":
        pytest.skip("the generator of the GPU gives other numbers; see the next test")
    theirs = score_filters(build(), measure, batches())
    ours = score_filters(build().to(DEVICE), measure, batches())
    assert {vector.device for vector in ours.values()} == {DEVICE}
    assert {vector.dtype for vector in ours.values()} == {torch.float64}
    assert_same_scores(ours, theirs)


def test_random_scores_are_repeatable_and_leave_the_global_generators_alone():
    net = mixed().to(DEVICE)
    before = generator_states()
    first, second, other = (score_filters(net, "random", seed=seed) for seed in (0, 0, 1))
    assert_identical(generator_states(), before)
    assert all(torch.equal(first[layer], second[layer]) for layer in first)
    assert any(not torch.equal(first[layer], other[layer]) for layer in first)


@pytest.mark.parametrize("bias", ["none", "magnitude", "distance_from_init"])
@pytest.mark.parametrize("measure", ["loss", "grasp"])
def test_scores_with_a_bias_equal_those_of_the_cpu(measure, bias):
    net, start = mixed(), initial_weights(mixed())
    initial = start if bias == "distance_from_init" else None
    theirs = score_filters(net, measure, class_batches(), bias=bias, initial_state=initial)
    # The initial weights stay on the CPU.
    ours = score_filters(net.to(DEVICE), measure, class_batches(), bias=bias, initial_state=initial)
    assert_same_scores(ours, theirs)


def gradients_of(net, batch):
    loss = F.cross_entropy(net(batch[0]), batch[1])
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))


@BY_NAME
def test_tracked_scores_equal_those_of_the_cpu(measure):
    if measure == "random":
        pytest.skip("the generator of the GPU gives other numbers")
    found = []
    for device in (torch.device("cpu"), DEVICE):
        net, tracker = mixed().to(device), Tracker(measure)
        for batch in moved(class_batches(), device):
            tracker.update(net, gradients_of(net, batch), batch=batch)
        saved = {name: value.to(device) for name, value in tracker.state_dict().items()}
        again = Tracker(measure)
        again.load_state_dict(saved)
        assert all(torch.equal(vector, again.scores()[layer]) for layer, vector in tracker.scores().items())
        found.append(tracker.scores())
    theirs, ours = found
    assert {vector.device for vector in ours.values()} == {DEVICE}
    assert_same_scores(ours, theirs)


# Hessian-gradient products


def products(net, batches, strategy):
    """Compute Hessian-gradient products over whole batches at temperature 1.

    Returns:
        The name of the strategy that was used, and the products by parameter name.
    """
    device = next(net.parameters()).device
    batches = moved(batches, device)
    with scoring_mode(net), second_order_kernels():
        layers = find_layers(net)
        refs = unique_refs(layers, "weight")
        hessian = HessianProducts(net, layers, refs, loss_function(None, None, 1.0), batches[0], strategy)
        return hessian.strategy, hessian.compute(batches, score.Ranks(None))


@cache
def products_on_cpu(name):
    build, batches = NETWORKS[name]
    return products(build(), batches(), "double_backward")[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_products_by_every_strategy_equal_those_of_the_cpu(name, strategy):
    build, batches = NETWORKS[name]
    used, found = products(build().to(DEVICE), batches(), strategy)
    assert used == strategy, f"{strategy} cannot be used for {name} here: {used} was used"
    assert_same_scores(found, products_on_cpu(name))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_default_strategy_is_that_of_the_cpu(name):
    """The batch norm of a GPU is another operator, with the same derivatives."""
    build, batches = NETWORKS[name]
    ours, theirs = (products(build().to(device), batches()[:1], None)[0] for device in (DEVICE, torch.device("cpu")))
    assert ours == theirs


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("measure", HESSIAN)
def test_scores_by_every_strategy_equal_those_of_the_cpu(measure, strategy, monkeypatch):
    theirs = score_filters(mixed(), measure, class_batches())
    monkeypatch.setattr(score, "HessianProducts", lambda *arguments: HessianProducts(*arguments, strategy=strategy))
    assert_same_scores(score_filters(mixed().to(DEVICE), measure, class_batches()), theirs)


# Synchronization between the host and the device


class Operators(TorchDispatchMode):
    """Records every operator and the devices of its results, while `is_on`."""

    def __init__(self):
        super().__init__()
        self.is_on, self.names, self.devices = False, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.is_on:
            self.names.append(str(func))
            if func is not torch.ops.aten._efficientzerotensor.default:  # it has no memory
                self.devices |= {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


class Guard:
    """Forbids synchronization from the first batch until the scores are complete.

    The check that all scores are finite is the only one that reads values; it ends the guarded section.

    Attributes:
        events: True for each start of the section, False for each end.
    """

    def __init__(self, monkeypatch, operators=None):
        self.events, self.operators = [], operators
        monkeypatch.setattr(Scores, "_first_not_finite", staticmethod(lambda scores: self.switch(False)))

    def switch(self, is_on):
        self.events.append(is_on)
        if self.operators is not None:
            self.operators.is_on = is_on
        if ON_CUDA:
            torch.cuda.set_sync_debug_mode("error" if is_on else "default")

    def batches(self, batches):
        for number, batch in enumerate(batches):
            if number == 0:
                self.switch(True)
            yield batch


def small_resnet():
    torch.manual_seed(0)
    return models.resnet56(10).to(DEVICE).eval()


PLACES = ["on the device", "on the host", "pinned"]


def placed(batches, place):
    if place == "on the device":
        return moved(batches)
    pins = place == "pinned" and ON_CUDA
    return [tuple(tensor.pin_memory() if pins else tensor for tensor in batch) for batch in batches]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "whole batches"])
@BY_NAME
def test_scoring_never_synchronizes(measure, balanced, place, monkeypatch):
    if not balanced and measure not in HESSIAN:
        pytest.skip("the same as balanced")
    net, data = small_resnet(), placed(images(dtype=torch.float32), place)
    score_filters(net, measure, data, balanced=balanced)  # creates what is created only once: handles, workspaces
    guard = Guard(monkeypatch)
    if measure not in WITH_BATCHES:
        guard.switch(True)
    scores = score_filters(net, measure, guard.batches(data), balanced=balanced)
    assert guard.events == [True, False], guard.events
    assert {vector.device for vector in scores.values()} == {DEVICE}


@pytest.mark.parametrize("measure", WITH_BATCHES)
def test_scoring_reads_no_value_and_allocates_on_no_other_device(measure, monkeypatch):
    net, data = mixed().to(DEVICE), moved(class_batches())
    with Operators() as operators:
        guard = Guard(monkeypatch, operators)
        score_filters(net, measure, guard.batches(data), balanced=False)
    assert guard.events == [True, False]
    assert len(operators.names) > 50
    assert not [name for name in operators.names if "_local_scalar_dense" in name or "item" in name]
    assert operators.devices - {"meta"} == {DEVICE.type}  # a meta tensor has no memory


@BY_NAME
def test_tracking_never_synchronizes(measure):
    net, batch = mixed().to(DEVICE), moved(class_batches())[0]
    tracker, gradients = Tracker(measure), gradients_of(net, batch)
    tracker.update(net, gradients, batch=batch)
    if ON_CUDA:
        torch.cuda.set_sync_debug_mode("error")
    tracker.update(net, gradients, batch=batch)
    if ON_CUDA:
        torch.cuda.set_sync_debug_mode("default")
    assert tracker.num_updates == 2


@only_cuda
def test_the_debug_mode_detects_a_synchronization():
    x = torch.ones(3, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


def test_a_training_step_of_the_classifier_never_synchronizes():
    classifier = ImageClassifier("resnet56", num_classes=10).to(DEVICE)
    batch = moved(images(dtype=torch.float32))[0]
    classifier.training_step(batch, 0).backward()
    if ON_CUDA:
        torch.cuda.set_sync_debug_mode("error")
    classifier.training_step(batch, 1).backward()


# Memory and side effects


@only_cuda
@pytest.mark.parametrize("place", ["on the host", "pinned"])
@pytest.mark.parametrize("measure", WITH_BATCHES)
def test_memory_does_not_grow_with_the_number_of_batches(measure, place):
    net = small_resnet()
    generator = torch.Generator().manual_seed(0)

    def peak(number):
        labels = torch.arange(64) % 10
        data = [(torch.randn(64, 3, 32, 32, generator=generator), labels) for _ in range(number)]
        data = placed(data, place)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated(DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        scores = score_filters(net, measure, data, balanced=False)
        assert len(scores) > 50
        return torch.cuda.max_memory_allocated(DEVICE) - held

    peak(1)
    two, eight = peak(2), peak(8)
    assert two > 2**20
    assert eight <= 1.05 * two, f"{two / 2**20:.1f} MiB for two batches, {eight / 2**20:.1f} MiB for eight"


@BY_NAME
def test_scoring_changes_neither_the_model_nor_the_generators(measure):
    net = nn.Sequential(mixed(), nn.Dropout(0.5)).to(DEVICE).train()
    batches = moved(class_batches())
    F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    gradients = {name: (p.grad, p.grad.clone()) for name, p in net.named_parameters()}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    generators = generator_states()

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]) + 0 * torch.rand((), device=DEVICE), batch[1])

    score_filters(net, measure, batches, loss_fn=loss)
    assert all(p.grad is gradients[name][0] for name, p in net.named_parameters())
    assert all(torch.equal(p.grad, gradients[name][1]) for name, p in net.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert_identical(generator_states(), generators)


@pytest.mark.parametrize("measure", ["loss", "fisher", "grad_preserve"])
def test_half_precision_weights_give_scores_near_those_of_float32(measure):
    data = images(dtype=torch.float32)
    net = load_golden_weights(models.vgg13(10), "vgg13").float().to(DEVICE)
    in_float32 = score_filters(net, measure, data)
    half = [map_tensors(batch, lambda t: t.bfloat16() if t.is_floating_point() else t) for batch in data]
    scores = score_filters(net.bfloat16(), measure, half)
    assert {vector.dtype for vector in scores.values()} == {torch.float32}
    assert_same_scores(scores, in_float32, limit=0.9)

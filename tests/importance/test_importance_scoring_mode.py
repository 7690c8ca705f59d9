"""Scoring restores the model: flags, gradients, statistics and random generators."""

import warnings

import pytest
import torch
from importance_nets import Mixed, class_batches, largest_difference, mixed
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gflow_pl.importance import Grasp, Tracker, measure_names, resolve_measure, score_filters

BY_NAME = pytest.mark.parametrize("measure", measure_names())


@BY_NAME
def test_the_model_is_restored(measure):
    net = mixed().train()
    net.bn1.eval()
    net.conv1.weight.requires_grad_(False)
    F.cross_entropy(net(class_batches()[0][0]), class_batches()[0][1]).backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    copies = {name: g.clone() for name, g in gradients.items() if g is not None}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    flags = {name: module.training for name, module in net.named_modules()}
    random = torch.get_rng_state()

    score_filters(net, measure, class_batches())

    assert all(p.grad is gradients[name] for name, p in net.named_parameters())
    assert all(torch.equal(gradients[name], copy) for name, copy in copies.items())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert {name: module.training for name, module in net.named_modules()} == flags
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert torch.equal(torch.get_rng_state(), random)


@BY_NAME
def test_a_frozen_weight_is_scored_like_any_other(measure):
    free, frozen = mixed(), mixed()
    frozen.requires_grad_(False)
    ours, theirs = (score_filters(net, measure, class_batches()) for net in (frozen, free))
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in theirs)


def hold_as_buffers(module, *names):
    for name in names:
        value = getattr(module, name).detach()
        delattr(module, name)
        module.register_buffer(name, value)


@BY_NAME
def test_a_weight_that_is_a_buffer_is_scored_like_any_other(measure):
    """As in torchvision's FrozenBatchNorm2d."""
    free, held = mixed(), mixed()
    hold_as_buffers(held.grouped, "weight")
    if not resolve_measure(measure).needs_hessian:  # whose direction it would leave: gradient flow moves parameters
        hold_as_buffers(held.bn1, "weight", "bias")
    ours, theirs = (score_filters(net, measure, class_batches()) for net in (held, free))
    assert all(largest_difference(ours[layer], theirs[layer]) < 1e-9 for layer in theirs)
    assert not any(buffer.requires_grad for buffer in held.buffers())


def test_a_hessian_measure_of_norms_reads_those_that_are_buffers():
    class NormGrasp(Grasp):
        name = "norm_grasp"
        reads = "norm"

    free, held = mixed(), mixed()
    hold_as_buffers(held.bn1, "weight", "bias")
    ours, theirs = (score_filters(net, NormGrasp(), class_batches()) for net in (held, free))
    assert all(largest_difference(ours[layer], theirs[layer]) < 1e-9 for layer in theirs)


def test_flags_are_restored_after_an_error():
    net = mixed().train()
    net.requires_grad_(False)
    with pytest.raises(ZeroDivisionError):
        score_filters(net, "loss", class_batches(), loss_fn=lambda model, batch: 1 / 0)
    assert net.training
    assert not any(p.requires_grad for p in net.parameters())


@BY_NAME
def test_scores_do_not_depend_on_modes_outside(measure):
    plain = score_filters(mixed().eval(), measure, class_batches())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = score_filters(mixed().train(), measure, class_batches())
    assert all(torch.equal(ours[layer], plain[layer]) for layer in plain)


@BY_NAME
def test_spectral_norm_is_not_updated_and_its_weight_is_scored(measure):
    torch.manual_seed(0)
    net = mixed().train()
    parametrizations.spectral_norm(net.conv1)
    parametrizations.weight_norm(net.hidden)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    ours = score_filters(net, measure, class_batches())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())

    plain = mixed()
    with torch.no_grad():
        plain.conv1.weight.copy_(net.eval().conv1.weight)
        plain.hidden.weight.copy_(net.hidden.weight)
    theirs = score_filters(plain, measure, class_batches())
    assert all(torch.allclose(ours[layer], theirs[layer], rtol=1e-7, atol=1e-18) for layer in theirs)


def norm_weights(net, kind, *, spectral=True):
    """Add a weight norm to the hidden layer and a spectral norm to the first, as parametrizations or as older hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old weight norm is deprecated
        norms = nn.utils if kind == "hooks" else parametrizations
        norms.weight_norm(net.hidden)
        if spectral:
            norms.spectral_norm(net.conv1)


@pytest.mark.parametrize("kind", ["state", "parameters", "hooks"])
@pytest.mark.parametrize("measure", ["biased_loss", "biased_loss_tracked", "grasp"])
def test_the_distance_of_a_derived_weight_is_that_of_its_values(measure, kind):
    torch.manual_seed(0)
    net = mixed()
    # The vectors of a spectral norm move in training: parameters alone do not say what it computed.
    norm_weights(net, kind, spectral=kind != "parameters")
    names = [name for name, _ in net.named_parameters()]
    start = {name: value.clone() for name, value in net.state_dict().items() if kind != "parameters" or name in names}
    with torch.no_grad():
        net.eval()(class_batches()[0][0])
        first = {name: getattr(net, name).weight.clone() for name in ("conv1", "hidden")}
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        net.train()(class_batches()[0][0])
    ours = score_filters(net, measure, class_batches(), initial_state=start)
    left = net.eval().hidden.weight.clone()
    with torch.no_grad():
        net(class_batches()[0][0])
    assert torch.equal(left, net.hidden.weight), "the initial weight does not stay behind"

    plain, plain_start = mixed(), {**mixed().state_dict()}
    with torch.no_grad():
        for name, value in net.eval().state_dict().items():
            if name in plain_start:
                plain.state_dict()[name].copy_(value)
        for name, weight in first.items():
            getattr(plain, name).weight.copy_(getattr(net, name).weight)
            plain_start[f"{name}.weight"] = weight
    theirs = score_filters(plain, measure, class_batches(), initial_state=plain_start)
    assert all(largest_difference(ours[layer], theirs[layer]) < 1e-9 for layer in theirs)


@pytest.mark.parametrize("measure", ["magnitude", "biased_loss_tracked"])
def test_a_weight_that_a_hook_computes_is_recomputed_before_it_is_scored(measure):
    torch.manual_seed(0)
    net = mixed().eval()
    norm_weights(net, "hooks")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    ours = score_filters(net, measure, class_batches())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    net(class_batches()[0][0])  # from here on the weights are those of the parameters anyway
    theirs = score_filters(net, measure, class_batches())
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in theirs)


@BY_NAME
def test_a_tied_weight_is_scored_in_each_layer_by_its_whole_gradient(measure):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(50, 50), nn.Linear(50, 50), nn.Linear(50, 3)
            self.second.weight = self.first.weight
            self.second.bias = self.first.bias

        def forward(self, x):
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))

    net = Tied().double()
    start = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    scores = score_filters(net, measure, class_batches(), initial_state=start)
    if resolve_measure(measure).statistic != "noise":
        assert torch.equal(scores["first"], scores["second"])
    # One layer called twice is the same function of the same weight.
    net.second = net.first
    before = list(net.parameters())
    once = score_filters(net, measure, class_batches(), initial_state=start)
    assert all(now is then for now, then in zip(net.parameters(), before, strict=True))
    assert torch.allclose(once["first"], scores["first"], rtol=1e-9)


@BY_NAME
def test_a_layer_without_filters_gets_no_scores(measure):
    class Emptied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.head = nn.Linear(50, 0), nn.Linear(0, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.b(self.a(x.flatten(1)))))

    scores = score_filters(Emptied().double(), measure, class_batches())
    assert [len(vector) for vector in scores.values()] == [0, 4, 3]


@BY_NAME
def test_half_precision_weights_are_scored_in_float32(measure):
    batches = [(images.bfloat16(), labels) for images, labels in class_batches()]
    scores = score_filters(mixed().bfloat16(), measure, batches, temperature=1.0)
    assert {vector.dtype for vector in scores.values()} == {torch.float32}


@BY_NAME
def test_a_loss_that_is_not_finite_is_refused(measure):
    batches = [(images * float("nan"), labels) for images, labels in class_batches()]
    if not resolve_measure(measure).needs_gradients:
        score_filters(mixed(), measure, batches)
        return
    with pytest.raises(ValueError, match=f"by measure '{measure}' hold NaN or infinity"):
        score_filters(mixed(), measure, batches)


@BY_NAME
def test_examples_of_one_class_only_give_scores_or_a_clear_error(measure):
    batches = [(images, torch.zeros_like(labels)) for images, labels in class_batches()]
    if resolve_measure(measure).needs_labels:
        with pytest.raises(ValueError, match=r"each of 3 classes needs 1 images, .* class 1 has 0, class 2 has 0"):
            score_filters(mixed(), measure, batches)
    scores = score_filters(mixed(), measure, batches, balanced=False)
    assert all(vector.isfinite().all() for vector in scores.values())


@BY_NAME
def test_a_network_of_one_class_has_scores_of_zero(measure):
    """The loss is zero for all weights: no gradient, no curvature, and no NaN."""
    batches = [(images, torch.zeros_like(labels)) for images, labels in class_batches()]
    with torch.random.fork_rng():
        net = Mixed(num_classes=1).double()
    scores = score_filters(net, measure, batches)
    assert all(vector.isfinite().all() for vector in scores.values())
    if resolve_measure(measure).needs_gradients:
        assert all((vector == 0).all() for vector in scores.values())


@BY_NAME
def test_a_dead_layer_scores_zero_and_no_nan(measure):
    net = mixed()
    with torch.no_grad():
        net.grouped.weight.zero_()
    scores = score_filters(net, measure, class_batches())
    facts = resolve_measure(measure)
    if facts.statistic != "noise" and facts.reads == "weight":
        assert (scores["grouped"] == 0).all()


def test_a_loss_without_gradient_is_refused():
    with pytest.raises(ValueError, match="the loss has no gradient"):
        score_filters(mixed(), "loss", class_batches(), loss_fn=lambda model, batch: model(batch[0]).detach().sum())
    with pytest.raises(ValueError, match=r"must be one number, the mean over the batch, got shape \(6, 3\)"):
        score_filters(mixed(), "loss", class_batches(), loss_fn=lambda model, batch: model(batch[0]))
    one = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="depends on none of the model's"):
        score_filters(mixed(), "loss", class_batches(), loss_fn=lambda model, batch: one * 2)


@BY_NAME
def test_tracking_restores_the_model(measure):
    net = mixed().train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    tracker = Tracker(measure)
    gradients = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    tracker.update(net, gradients, batch=class_batches()[0])
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())

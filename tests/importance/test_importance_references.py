"""Every measure against a slow, obvious version: loops over layers and filters, and the full Hessian."""

import math

import pytest
import torch
from importance_nets import class_batches, largest_difference, mixed
from torch.func import functional_call, hessian
from torch.nn import functional as F

from gflow_pl.importance import measure_names, resolve_measure, score_filters

NORMS = {"conv1": "bn1", "grouped": "bn2"}
GROUPS = {"up": 2}


def filter_of(weight, layer, number):
    """The weights of one filter, from a weight tensor or a tensor of its shape."""
    if layer not in GROUPS:
        return weight[number].flatten()
    inputs, outputs = weight.shape[0] // GROUPS[layer], weight.shape[1]
    group, place = divmod(number, outputs)
    return weight[group * inputs : (group + 1) * inputs, place].flatten()


def num_filters(weight, layer):
    return weight.shape[1] * GROUPS[layer] if layer in GROUPS else weight.shape[0]


def gradients(net, batch, temperature):
    net.eval()
    loss = F.cross_entropy(net(batch[0]) / temperature, batch[1])
    parameters = dict(net.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def mean_gradient(net, batches, temperature):
    total = sum(len(labels) for _, labels in batches)
    mean = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for batch in batches:
        for name, gradient in gradients(net, batch, temperature).items():
            mean[name] += gradient * len(batch[1]) / total
    return mean


def full_hessian_product(net, batches, temperature):
    """H g from the full Hessian of the loss."""
    net.eval()
    weights = {name: p.detach() for name, p in net.named_parameters()}
    names, shapes = list(weights), [w.shape for w in weights.values()]
    flat = torch.cat([w.flatten() for w in weights.values()])
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss(vector):
        parts = vector.split([math.prod(shape) for shape in shapes])
        own = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(net, own, (images,)) / temperature, labels)

    mean = mean_gradient(net, batches, temperature)
    product = hessian(loss)(flat) @ torch.cat([mean[name].flatten() for name in names])
    parts = product.split([math.prod(shape) for shape in shapes])
    return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}


def norm_pair(net, layer, number, grads):
    """Values and gradients of scale and shift of the norm behind a filter, or of an identity if there is none."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    if layer in NORMS:
        norm = NORMS[layer]
        scale, shift = (parameters[f"{norm}.{kind}"][number] for kind in ("weight", "bias"))
        return scale, shift, grads[f"{norm}.weight"][number], grads[f"{norm}.bias"][number]
    weight, gradient = (filter_of(source[f"{layer}.weight"], layer, number) for source in (parameters, grads))
    bias, bias_gradient = parameters[f"{layer}.bias"][number], grads[f"{layer}.bias"][number]
    scale_gradient = (weight * gradient).sum() + bias * bias_gradient
    return torch.tensor(1.0), torch.tensor(0.0), scale_gradient, bias_gradient


class Filter:
    """A filter with everything that a slow version of a measure may read."""

    def __init__(self, net, layer, number, start, mean, per_batch, sizes, product):
        weights = {name: p.detach() for name, p in net.named_parameters()}
        key = f"{layer}.weight"
        self.weight = filter_of(weights[key], layer, number)
        self.start = self.weight * 0 if start is None else filter_of(start[key], layer, number)
        self.gradient = filter_of(mean[key], layer, number)
        self.batch_gradients = [filter_of(gradients[key], layer, number) for gradients in per_batch]
        self.shares = [size / sum(sizes) for size in sizes]
        self.product = filter_of(product[key], layer, number)
        self.has_norm = layer in NORMS
        self.norms = [norm_pair(net, layer, number, gradients) for gradients in per_batch]

    @property
    def distance(self):
        """|theta| without initial weights, which then count as zero."""
        return (self.weight - self.start).abs()


def averaged(f):
    score = 0.0
    for gradient in f.batch_gradients:
        score = 0.8 * float((f.distance * (f.weight * gradient).abs()).sum()) + 0.2 * score
    return score


def nvidia(f):
    pairs = zip(f.norms, f.shares, strict=True)
    return sum(share * ((w * g_w) ** 2 + (b * g_b) ** 2) for (w, b, g_w, g_b), share in pairs)


REFERENCES = {
    "magnitude": lambda f: sum(float(v) ** 2 for v in f.weight) ** 0.5,
    "l1": lambda f: sum(abs(float(v)) for v in f.weight),
    "bn": lambda f: abs(f.norms[0][0]) if f.has_norm else 1.0,
    "loss": lambda f: sum(abs(float(w * g)) for w, g in zip(f.weight, f.gradient, strict=True)),
    "biased_loss": lambda f: sum(
        abs(float(d)) * abs(float(w * g)) for d, w, g in zip(f.distance, f.weight, f.gradient, strict=True)
    ),
    "biased_loss_tracked": averaged,
    "tfo": lambda f: abs(sum(float(w * g) for w, g in zip(f.weight, f.gradient, strict=True))),
    "fisher": lambda f: sum(
        share * float((f.weight**2 * g**2).sum()) for g, share in zip(f.batch_gradients, f.shares, strict=True)
    ),
    "nvidia": nvidia,
    "grasp": lambda f: (f.weight * f.product).sum(),
    "grad_preserve": lambda f: (f.weight * f.product).sum().abs(),
}
"""The slow version of every measure: the score of one `Filter`."""


def reference(measure, net, batches, temperature, start=None):
    per_batch = [gradients(net, batch, temperature) for batch in batches]
    sizes = [len(labels) for _, labels in batches]
    mean = mean_gradient(net, batches, temperature)
    product = full_hessian_product(net, batches, temperature) if resolve_measure(measure).needs_hessian else mean
    scores = {}
    for layer in [
        name for name, module in net.named_modules() if hasattr(module, "weight") and name not in NORMS.values()
    ]:
        filters = [
            Filter(net, layer, number, start, mean, per_batch, sizes, product)
            for number in range(num_filters(net.get_parameter(f"{layer}.weight"), layer))
        ]
        scores[layer] = torch.tensor([float(REFERENCES[measure](f)) for f in filters], dtype=torch.float64)
    return scores


MEASURES = [name for name in measure_names() if resolve_measure(name).statistic != "noise"]


def test_every_measure_has_a_slow_version():
    assert set(REFERENCES) == set(MEASURES)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_equals_its_slow_version(measure, temperature):
    net, batches = mixed(), class_batches()
    batches[-1] = (batches[-1][0][:3], torch.tensor([2, 0, 1]))  # the last batch is shorter: sizes must count
    ours = score_filters(net, measure, batches, temperature=temperature)
    theirs = reference(measure, net, batches, temperature)
    assert list(ours) == list(theirs) == ["conv1", "grouped", "up", "hidden", "head"]
    assert sum(v.numel() for v in ours.values()) == 4 + 6 + 4 + 5 + 3
    assert all(largest_difference(ours[layer], theirs[layer]) < 1e-9 for layer in ours)


@pytest.mark.parametrize("measure", ["biased_loss", "biased_loss_tracked"])
def test_initial_weights_turn_the_bias_into_the_distance_from_them(measure):
    net, batches = mixed(), class_batches()
    start = mixed(seed=7).state_dict()
    ours = score_filters(net, measure, batches, initial_state=start)
    theirs = reference(measure, net, batches, 1.0, start)
    assert all(largest_difference(ours[layer], theirs[layer]) < 1e-9 for layer in ours)


@pytest.mark.parametrize("measure", [name for name in MEASURES if resolve_measure(name).needs_gradients])
@pytest.mark.parametrize("bias", ["magnitude", "distance_from_init"])
def test_each_gradient_measure_takes_each_bias(measure, bias):
    net, batches, start = mixed(), class_batches(), mixed(seed=7).state_dict()
    plain = score_filters(net, measure, batches, bias="none")
    biased = score_filters(net, measure, batches, bias=bias, initial_state=start)
    # With weights all one distance from their start, or all of one size, the bias is a common factor.
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if bias == "magnitude":
                parameter.copy_(parameter.sign() * 0.5)
            start[name] = parameter.detach() - 0.25
    again, of_one_size = (score_filters(net, measure, batches, bias=b, initial_state=start) for b in ("none", bias))
    factor = 0.5 if bias == "magnitude" else 0.25
    assert any(not torch.equal(plain[layer], biased[layer]) for layer in plain)
    # The head of nvidia and the like has no norm: its stand-in has weight 1 and bias 0, not half.
    layers = NORMS if resolve_measure(measure).reads == "norm" else again
    assert all(largest_difference(of_one_size[layer], again[layer] * factor) < 1e-9 for layer in layers)

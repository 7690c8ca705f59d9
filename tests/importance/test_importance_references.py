"""Every measure against a slow, obvious version: loops over layers and filters, and a Hessian written out in full."""

import math

import pytest
import torch
from importance_nets import class_batches, largest_difference, mixed
from torch.func import functional_call, hessian
from torch.nn import functional as F

from gflow_pl.importance import measure_names, score_filters

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
    """H g with every second derivative of the loss written out."""
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
    """Value and gradient of the scale and shift behind a filter; those of an identity where there is no norm."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    if layer in NORMS:
        norm = NORMS[layer]
        scale, shift = (parameters[f"{norm}.{kind}"][number] for kind in ("weight", "bias"))
        return scale, shift, grads[f"{norm}.weight"][number], grads[f"{norm}.bias"][number]
    weight, gradient = (filter_of(source[f"{layer}.weight"], layer, number) for source in (parameters, grads))
    bias, bias_gradient = parameters[f"{layer}.bias"][number], grads[f"{layer}.bias"][number]
    scale_gradient = (weight * gradient).sum() + bias * bias_gradient
    return torch.tensor(1.0), torch.tensor(0.0), scale_gradient, bias_gradient


def reference(measure, net, batches, temperature, start=None):
    weights = {name: p.detach() for name, p in net.named_parameters()}
    per_batch = [gradients(net, batch, temperature) for batch in batches]
    sizes = [len(labels) for _, labels in batches]
    mean = mean_gradient(net, batches, temperature)
    if measure in ("grasp", "grad_preserve"):
        product = full_hessian_product(net, batches, temperature)
    layers = [name for name, module in net.named_modules() if hasattr(module, "weight") and name not in NORMS.values()]
    scores = {}
    for layer in layers:
        key, found = f"{layer}.weight", []
        for n in range(num_filters(weights[key], layer)):
            w, g = filter_of(weights[key], layer, n), filter_of(mean[key], layer, n)
            away = w if start is None else w - filter_of(start[key], layer, n)
            if measure == "magnitude":
                score = sum(float(v) ** 2 for v in w) ** 0.5
            elif measure == "l1":
                score = sum(abs(float(v)) for v in w)
            elif measure == "bn":
                score = abs(float(weights[f"{NORMS[layer]}.weight"][n])) if layer in NORMS else 1.0
            elif measure == "loss":
                score = sum(abs(float(a * b)) for a, b in zip(w, g, strict=True))
            elif measure == "biased_loss":
                score = sum(abs(float(c)) * abs(float(a * b)) for a, b, c in zip(w, g, away, strict=True))
            elif measure == "biased_loss_tracked":
                score = 0.0
                for grads in per_batch:
                    b = filter_of(grads[key], layer, n)
                    score = 0.8 * float((away.abs() * (w * b).abs()).sum()) + 0.2 * score
            elif measure == "tfo":
                score = abs(sum(float(a * b) for a, b in zip(w, g, strict=True)))
            elif measure == "fisher":
                score = 0.0
                for grads, size in zip(per_batch, sizes, strict=True):
                    score += float((w**2 * filter_of(grads[key], layer, n) ** 2).sum()) * size / sum(sizes)
            elif measure == "nvidia":
                score = 0.0
                for grads, size in zip(per_batch, sizes, strict=True):
                    scale, shift, of_scale, of_shift = norm_pair(net, layer, n, grads)
                    score += float((scale * of_scale) ** 2 + (shift * of_shift) ** 2) * size / sum(sizes)
            elif measure in ("grasp", "grad_preserve"):
                score = float((w * filter_of(product[key], layer, n)).sum())
                score = abs(score) if measure == "grad_preserve" else score
            found.append(score)
        scores[layer] = torch.tensor(found, dtype=torch.float64)
    return scores


MEASURES = [name for name in measure_names() if name != "random"]


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


@pytest.mark.parametrize("measure", [name for name in MEASURES if name not in ("magnitude", "l1", "bn")])
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
    layers = NORMS if measure == "nvidia" else again
    assert all(largest_difference(of_one_size[layer], again[layer] * factor) < 1e-9 for layer in layers)

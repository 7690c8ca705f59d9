"""Every recorded score of the published code, in float64."""

from functools import cache

import pytest
import torch
from golden_recipe import GOLDEN_NAMES, golden, golden_images, golden_labels, golden_weights, load_golden_weights
from torch import nn

from gflow_pl import models
from gflow_pl.importance import Importance, Tracker, resolve_measure, score_filters
from gflow_pl.importance.gradients import loss_function

NUM_FILTERS = {"vgg13": 2944, "resnet56": 2128}
FIRST_ORDER = ["loss_based", "biased_loss", "biased_loss_init", "tfo", "fisher", "nvidia"]


class SquaredTerms(Importance):
    """Sum of squares of theta g. This and the plain sum are recorded of `biased_loss_tracked`."""

    name = "squared_terms"
    statistic = "gradient"

    def summand(self, theta, flow):
        return (theta * flow).square()


@cache
def network(name):
    return load_golden_weights(getattr(models, name)(num_classes=10), name)


@cache
def initial(name):
    return {key: torch.from_numpy(value).double() for key, value in golden_weights(name, init=True).items()}


def loader(num_images):
    images, labels = golden_images()[:num_images], golden_labels()[:num_images]
    return list(zip(images.split(16), labels.split(16), strict=True))


def compare(name, key, scores, *, factor=1.0, relative=1e-6, absolute=0.0):
    record = golden(f"importance_f64_{GOLDEN_NAMES[name]}")
    offsets, expected = record["layer_offsets"], torch.from_numpy(record[f"{key}__f64"]).double()
    compared = 0
    for i, layer in enumerate(record["layer_conv_names"].tolist()):
        theirs, ours = expected[offsets[i] : offsets[i + 1]], scores[layer] / factor
        assert ours.dtype == torch.float64
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= relative * theirs.abs().max() + absolute, (key, layer)
        compared += ours.numel()
    assert compared == NUM_FILTERS[name]


@pytest.mark.parametrize("name", NUM_FILTERS)
@pytest.mark.parametrize("measure", ["mag_based", "l1", "bn"])
def test_measures_of_weights_equal_the_published_ones(name, measure):
    compare(name, measure, score_filters(network(name), measure))


@pytest.mark.slow
@pytest.mark.parametrize("name", NUM_FILTERS)
@pytest.mark.parametrize("temperature", [1, 5])
@pytest.mark.parametrize("key", FIRST_ORDER)
def test_first_order_measures_equal_the_published_ones(name, key, temperature):
    compare(name, f"{key}__T{temperature}", first_order(name, key, temperature))


def test_one_first_order_measure_of_each_statistic_equals_the_published_one():
    for key in ("biased_loss_init", "nvidia"):
        compare("vgg13", f"{key}__T5", first_order("vgg13", key, 5))


def first_order(name, key, temperature):
    start = initial(name) if key.endswith("_init") else None
    measure = key.removesuffix("_init")
    return score_filters(
        network(name), measure, loader(160), temperature=temperature, num_samples=80, initial_state=start
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NUM_FILTERS)
@pytest.mark.parametrize("temperature", [1, 5])
def test_terms_of_the_tracked_measure_equal_the_published_sums(name, temperature):
    key = f"biased_loss_tracked__T{temperature}"
    options = {"temperature": temperature, "num_samples": 80}
    compare(name, f"{key}__rowsum", score_filters(network(name), "loss", loader(80), **options))
    compare(name, f"{key}__rowsumsq", score_filters(network(name), SquaredTerms(), loader(80), **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", NUM_FILTERS)
@pytest.mark.parametrize(
    ("measure", "temperature"), [("grasp", 200), ("grasp", 1), ("grad_preserve", 200), ("grad_preserve", 1)]
)
def test_second_order_measures_equal_the_published_ones(name, measure, temperature):
    scores = score_filters(network(name), measure, loader(160), temperature=temperature, num_samples=80)
    compare(name, f"{measure}__T{temperature}", scores)


@pytest.mark.parametrize(("measure", "temperature"), [("grasp", 200.0), ("grad_preserve", 1.0)])
def test_second_order_measures_have_the_published_temperatures(measure, temperature):
    net, batches = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(), []
    batches.append((torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 2))
    plain, named = (score_filters(net, measure, batches, temperature=t) for t in (None, temperature))
    assert all(torch.equal(plain[layer], named[layer]) for layer in plain)


@cache
def training_gradients(name, number, temperature):
    """The gradient of one batch in training mode, from a fresh network, so that statistics do not change."""
    net = load_golden_weights(getattr(models, name)(num_classes=10), name).train()
    images, labels = loader(32)[number]
    loss = nn.functional.cross_entropy(net(images) / temperature, labels)
    return dict(
        zip((n for n, _ in net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True)
    )


def tracked(name, measure, numbers, temperature=5, **options):
    tracker = Tracker(measure, **options)
    for number in numbers:
        tracker.update(network(name), training_gradients(name, number, temperature))
    return tracker.scores()


# Behind a conv that a norm in training mode follows, w.g vanishes up to epsilon: what is left of `tfo` is rounding.
LOOSE = {"relative": 1e-4, "absolute": 1e-9}


@pytest.mark.parametrize("name", NUM_FILTERS)
def test_tracked_scores_equal_the_published_ones(name):
    once = 0.8  # one update of the average, zero before
    for t in (1, 5):
        compare(name, f"tracking__loss_based__T{t}", tracked(name, "loss", [0], t), factor=once)
        compare(name, f"tracking__biased_loss__T{t}", tracked(name, "biased_loss", [0], t), factor=once)
        compare(name, f"tracking__tfo__T{t}", tracked(name, "tfo", [0], t), factor=once, **LOOSE)
        key = f"tracking__biased_loss_tracked__T{t}"
        compare(name, f"{key}__rowsum", tracked(name, "biased_loss_tracked", [0], t, bias="none"), factor=once)
        compare(name, f"{key}__rowsumsq", tracked(name, SquaredTerms(), [0], t), factor=once)
    compare(name, "tracking__ema_l2__biased_loss_tracked__T5", tracked(name, "biased_loss_tracked", [0, 1]))
    start = {"initial_state": initial(name)}
    key = "tracking__ema_l2_init__biased_loss_tracked__T5"
    compare(name, key, tracked(name, "biased_loss_tracked", [0, 1], **start))
    compare(name, "tracking__ema_nol2__tfo__T5", tracked(name, "tfo", [0, 1]), **LOOSE)


@pytest.mark.parametrize("temperature", [1, 5])
@pytest.mark.parametrize("measure", ["fisher", "nvidia"])
@pytest.mark.parametrize("name", NUM_FILTERS)
def test_tracked_squares_are_squares_where_the_published_code_omits_them(name, measure, temperature):
    """Without its square, the measure equals the published one; with it, the formula."""

    class Unsquared(type(resolve_measure(measure))):
        statistic = "gradient"

    key, once = f"tracking__{measure}__T{temperature}", 0.8
    compare(name, key, tracked(name, Unsquared(), [0], temperature), factor=once)
    record = golden(f"importance_f64_{GOLDEN_NAMES[name]}")
    assert record[f"{key}__f64"].min() < 0

    ours, gradients = tracked(name, measure, [0], temperature), training_gradients(name, 0, temperature)
    compared = 0
    for layer, norm in zip(record["layer_conv_names"].tolist(), record["layer_bn_names"].tolist(), strict=True):
        tensors = [f"{layer}.weight"] if measure == "fisher" else [f"{norm}.weight", f"{norm}.bias"]
        products = [network(name).get_parameter(tensor).detach() * gradients[tensor] for tensor in tensors]
        expected = once * sum(product.square().reshape(len(product), -1).sum(1) for product in products)
        assert (ours[layer] - expected).abs().max() <= 1e-9 * expected.abs().max()
        compared += len(expected)
    assert compared == NUM_FILTERS[name]


@pytest.mark.parametrize("temperature", [1, 5])
@pytest.mark.parametrize("name", NUM_FILTERS)
def test_the_loss_behind_the_tracked_scores_is_the_published_one(name, temperature):
    net = load_golden_weights(getattr(models, name)(num_classes=10), name).train()
    images, labels = loader(16)[0]
    loss = loss_function(None, None, float(temperature))(net, (images, labels))
    recorded = golden(f"importance_f64_{GOLDEN_NAMES[name]}")[f"tracking_loss__T{temperature}__f64"]
    assert float(loss.detach()) == pytest.approx(float(recorded), rel=1e-9)

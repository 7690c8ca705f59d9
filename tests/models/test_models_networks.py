"""The five networks: recorded counts, documented tensor names, golden logits, other image sizes."""

import numpy as np
import pytest
import torch
from golden_recipe import GOLDEN_NAMES, golden, golden_images, golden_labels, load_golden_weights, x_fixed
from torch.utils.flop_counter import FlopCounterMode

import gflow_pl.models
from gflow_pl.models import MODELS, build, check_image_size

MULTIPLY_ADDS = {
    "vgg13": 228_267_008,
    "mobilenet_v1": 46_354_432,
    "resnet56": 125_747_840,
    "resnet34": 1_159_402_496,
    "resnet18": 555_422_720,
}
PARAMETERS = {
    "vgg13": 9_413_066,
    "mobilenet_v1": 3_217_226,
    "resnet56": 855_770,
    "resnet34": 21_282_122,
    "resnet18": 11_173_962,
}


def build_on_meta(name, num_classes=10):
    with torch.device("meta"):
        return build(name, num_classes).eval()


def test_every_network_has_recorded_counts_and_is_public():
    assert set(MODELS) == set(MULTIPLY_ADDS) == set(PARAMETERS)
    assert set(MODELS) <= set(gflow_pl.models.__all__)


@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_and_parameters_are_those_of_the_paper(name):
    net = build_on_meta(name)
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() == 2 * MULTIPLY_ADDS[name]
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_tensor_names_shapes_and_order_are_the_recorded_ones(name):
    record = golden(f"model_{GOLDEN_NAMES[name]}")
    state = build_on_meta(name).state_dict()
    assert list(state) == record["tensor_names"].tolist()
    shapes = [tuple(n for n in shape if n >= 0) for shape in record["tensor_shapes"].tolist()]
    assert [tuple(t.shape) for t in state.values()] == shapes


def norm_names(prefix):
    return [f"{prefix}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def documented_mobilenet_names():
    names = ["conv1.weight", *norm_names("bn1")]
    for n in range(13):
        for k in (1, 2):
            names += [f"layers.{n}.conv{k}.weight", *norm_names(f"layers.{n}.bn{k}")]
    return [*names, "linear.weight", "linear.bias"]


def documented_resnet_names(num_blocks):
    names = ["conv1.weight", *norm_names("bn1")]
    for stage, count in enumerate(num_blocks, start=1):
        for n in range(count):
            block = f"layer{stage}.{n}"
            for k in (1, 2):
                names += [f"{block}.conv{k}.weight", *norm_names(f"{block}.bn{k}")]
            if stage > 1 and n == 0:
                names += [f"{block}.shortcut.0.weight", *norm_names(f"{block}.shortcut.1")]
    return [*names, "linear.weight", "linear.bias"]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("mobilenet_v1", documented_mobilenet_names()),
        ("resnet34", documented_resnet_names((3, 4, 6, 3))),
        ("resnet18", documented_resnet_names((2, 2, 2, 2))),
    ],
)
def test_tensor_names_and_order_are_the_documented_ones(name, names):
    assert list(build_on_meta(name).state_dict()) == names


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_logits_equal_the_published_ones(name):
    record = golden(f"model_{GOLDEN_NAMES[name]}")
    net = load_golden_weights(build(name, 10), name)
    x = x_fixed()
    with torch.no_grad():
        logits = {"eval": net(x), "train": net.train()(x), "eval_after_one_train_forward": net.eval()(x)}
    for mode, value in logits.items():
        np.testing.assert_allclose(value.numpy(), record[f"logits_{mode}_f64"], rtol=1e-9, atol=1e-9, err_msg=mode)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_accepts_64_pixels_and_200_classes_and_trains_every_parameter(name):
    torch.manual_seed(0)
    net = build(name, 200)
    out = net(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 200)
    out.logsumexp(1).sum().backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_min_image_size_is_the_smallest_size_that_works(name):
    net = build_on_meta(name)
    works = []
    for size in range(1, 34):
        try:
            net(torch.empty(1, 3, size, size, device="meta"))
        except RuntimeError:
            continue
        works.append(size)
    assert getattr(net, "min_image_size", 1) == works[0]
    assert works == list(range(works[0], 34))


def test_images_too_small_are_one_sentence():
    with pytest.raises(
        ValueError, match=r"^Images of 16x48 pixels are too small for VGG, which needs at least 32x32: .*\.$"
    ):
        check_image_size(build_on_meta("vgg13"), (16, 48))
    check_image_size(build_on_meta("vgg13"), 32)
    check_image_size(build_on_meta("resnet56"), 8)
    check_image_size(torch.nn.Identity(), 1)


def test_an_unknown_network_is_refused_with_the_nearest_name():
    known = ", ".join(sorted(MODELS))
    with pytest.raises(ValueError, match=rf"^Unknown network 'resnet57'. Known: {known}. Did you mean 'resnet56'\?$"):
        build("resnet57", 10)
    with pytest.raises(ValueError, match=rf"^Unknown network 'qqq'. Known: {known}\.$"):
        build("qqq", 10)


def test_no_classes_is_one_sentence():
    with pytest.raises(ValueError, match=r"`num_classes` must be at least 1, got 0\."):
        build("vgg13", 0)


def test_the_golden_inputs_are_the_recorded_ones():
    images, labels = golden_images(), golden_labels()
    assert images.sum().item() == pytest.approx(-944.3346031759711, abs=1e-9)
    assert x_fixed().sum().item() == pytest.approx(66.9630090405335, abs=1e-9)
    assert labels[:80].bincount().tolist() == labels[80:].bincount().tolist() == [8] * 10
    assert int((labels * torch.arange(160)).sum()) == 57914

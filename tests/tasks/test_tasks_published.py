"""Weight files of the published code, pruned or with zeroed filters, compute what networks built by hand compute."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gflow_pl.__main__ import main
from gflow_pl.models import build
from gflow_pl.tasks import ImageClassifier

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().mul(2).reshape(2, 3, 32, 32)


def random_weights(network: torch.nn.Module) -> dict[str, Tensor]:
    """Return a state dict whose norms are not the identity."""
    torch.manual_seed(0)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for name, value in state.items():
        if value.ndim == 1 and value.is_floating_point():
            state[name] = torch.rand_like(value) + 0.5
    return state


def published(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"net": {f"module.{k}": v for k, v in state.items()}, "cfg": [np.int64(3), "M", (np.int64(5), 2)]}, path)
    return path


def keep(state: dict[str, Tensor], indices: dict[str, tuple[Tensor | None, Tensor | None]]) -> dict[str, Tensor]:
    """Return a state dict with some of the outputs (dim 0) and inputs (dim 1) of some tensors."""
    cut = {}
    for name, value in state.items():
        rows, columns = next((pair for prefix, pair in indices.items() if name.startswith(prefix)), (None, None))
        if rows is not None and value.ndim > 0:
            value = value[rows]
        if columns is not None and value.ndim > 1:
            value = value[:, columns]
        cut[name] = value
    return cut


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts)


def pruned_vgg() -> dict[str, Tensor]:
    """Return a state dict of VGG-13 with another width in every layer."""
    state = random_weights(build("vgg13", 10))
    convs = [name for name, value in state.items() if value.ndim == 4]
    indices, before = {}, None
    for position, name in enumerate(convs):
        rows = torch.arange(position % 3, len(state[name]), 2 + position % 2)
        conv = int(name.split(".")[1])
        indices[f"features.{conv}."] = (rows, before)
        indices[f"features.{conv + 2}."] = (rows, None)
        before = rows
    indices["classifier."] = (None, before)
    return keep(state, indices)


def vgg_by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    convs = [int(name.split(".")[1]) for name, value in state.items() if value.ndim == 4]
    for position, conv in enumerate(convs):
        x = F.conv2d(x, state[f"features.{conv}.weight"], state.get(f"features.{conv}.bias"), padding=1)
        x = norm(state, f"features.{conv + 2}", x.relu())
        following = convs[position + 1] if position + 1 < len(convs) else None
        if following is None or following - conv > 3:
            x = F.max_pool2d(x, 2)
    x = x.mean(dim=(2, 3))
    return F.linear(x, state["classifier.weight"], state["classifier.bias"])


def pruned_mobilenet() -> dict[str, Tensor]:
    """Return a state dict of MobileNet-V1 whose pointwise convolutions, and the depthwise ones behind them, lost
    filters.
    """
    state = random_weights(build("mobilenet_v1", 10))
    before = torch.arange(0, 32, 3)
    indices = {"conv1.": (before, None), "bn1.": (before, None)}
    for block in range(13):
        rows = torch.arange(block % 2, len(state[f"layers.{block}.conv2.weight"]), 2 + block % 3)
        indices[f"layers.{block}.conv1."] = indices[f"layers.{block}.bn1."] = (before, None)
        indices[f"layers.{block}.conv2."] = (rows, before)
        indices[f"layers.{block}.bn2."] = (rows, None)
        before = rows
    indices["linear."] = (None, before)
    return keep(state, indices)


def mobilenet_by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    x = norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)).relu()
    for block in range(13):
        here, weight = f"layers.{block}", state[f"layers.{block}.conv1.weight"]
        stride = 2 if block in (1, 3, 5, 11) else 1
        x = norm(state, f"{here}.bn1", F.conv2d(x, weight, stride=stride, padding=1, groups=len(weight))).relu()
        x = norm(state, f"{here}.bn2", F.conv2d(x, state[f"{here}.conv2.weight"])).relu()
    return F.linear(x.mean(dim=(2, 3)), state["linear.weight"], state["linear.bias"])


def pruned_resnet() -> dict[str, Tensor]:
    """Return a state dict of ResNet-18 with fewer filters in the first and zeroed ones in the second convolutions."""
    state = random_weights(build("resnet18", 10))
    indices = {}
    for stage in range(1, 5):
        for block in range(2):
            here = f"layer{stage}.{block}"
            rows = torch.arange(block, len(state[f"{here}.conv1.weight"]), 2 + stage % 2)
            indices[f"{here}.conv1."], indices[f"{here}.conv2."] = (rows, None), (None, rows)
            indices[f"{here}.bn1."] = (rows, None)
    state = keep(state, indices)
    for name in [name for name in state if name.endswith(("conv2.weight", "shortcut.0.weight"))]:
        behind = name.replace("conv2", "bn2").replace("shortcut.0", "shortcut.1").removesuffix(".weight")
        for tensor in (name, f"{behind}.weight", f"{behind}.bias", f"{behind}.running_mean"):
            state[tensor] = state[tensor].clone()
            state[tensor][::3] = 0
    return state


def resnet_by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    x = norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)).relu()
    for stage in range(1, 5):
        for block in range(2):
            here, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = F.conv2d(x, state[f"{here}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(norm(state, f"{here}.bn1", out).relu(), state[f"{here}.conv2.weight"], padding=1)
            if f"{here}.shortcut.0.weight" in state:
                x = norm(state, f"{here}.shortcut.1", F.conv2d(x, state[f"{here}.shortcut.0.weight"], stride=stride))
            x = (norm(state, f"{here}.bn2", out) + x).relu()
    return F.linear(x.mean(dim=(2, 3)), state["linear.weight"], state["linear.bias"])


CASES = {
    "vgg13": (pruned_vgg, vgg_by_hand),
    "mobilenet_v1": (pruned_mobilenet, mobilenet_by_hand),
    "resnet18": (pruned_resnet, resnet_by_hand),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_published_file_computes_what_a_network_built_by_hand_computes(name, tmp_path) -> None:
    make, by_hand = CASES[name]
    state = make()
    classifier = ImageClassifier(name, num_classes=10, pretrained=str(published(tmp_path / "pruned.pth", state))).eval()
    assert {k: v.shape for k, v in classifier.network.state_dict().items()} == {k: v.shape for k, v in state.items()}
    with torch.no_grad():
        expected = by_hand({k: v.double() for k, v in state.items()}, IMAGES.double())
        torch.testing.assert_close(classifier.double()(IMAGES.double()), expected, rtol=1e-10, atol=1e-10)
    assert expected.std() > 1e-3, "the outputs differ from each other"


def test_a_pruned_published_file_is_tested_and_pruned_again(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    state = pruned_resnet()
    published(tmp_path / "pruned.pth", state)
    tiny = ["--model.network", "resnet18", "--model.pretrained", "pruned.pth", "--trainer.accelerator", "cpu"]
    assert main(["test", *tiny, "--counts_only", "true", "--name", "counts"]) == 0
    parameters = sum(v.numel() for k, v in state.items() if k.endswith(("weight", "bias")))
    full = sum(p.numel() for p in build("resnet18", 10).parameters())
    output = capsys.readouterr().out
    assert f"{parameters:,}" in output
    assert f"{full:,}" in output

    tiny += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1", "--data.batch_size", "8"]
    pruning = ["--pruning.fraction", "0.3", "--pruning.num_samples", "8", "--pruning.evaluate_cuts", "false"]
    assert main(["prune", *tiny, *pruning, "--trainer.max_epochs", "2", "--name", "again"]) == 0
    last = torch.load("checkpoints/again/last.ckpt", weights_only=True)
    again = ImageClassifier("resnet18", num_classes=10, pretrained="checkpoints/again/last.ckpt")
    assert sum(p.numel() for p in again.parameters()) < parameters
    assert all(torch.equal(v, last["state_dict"][k]) for k, v in again.state_dict().items())

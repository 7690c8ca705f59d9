"""ImageClassifier: descriptions of networks, checkpoints, metrics, and settings out of range."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from gflow_pl import ImageClassifier
from gflow_pl.models import MODELS


def batches(number: int = 2, size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(number * size, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(number * size) % 10), batch_size=size)


def quiet_trainer(tmp_path, **options) -> pl.Trainer:
    settings = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", **{**settings, **options})


@pytest.mark.parametrize("network", sorted(MODELS))
def test_a_network_by_its_name(network) -> None:
    classifier = ImageClassifier(network, num_classes=7)
    assert classifier.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert classifier.hparams.network == network


def test_a_training_step_copies_no_number_to_the_device(monkeypatch) -> None:
    """torchmetrics copies Python numbers to the device, which synchronizes a GPU in every step."""
    given = []
    monkeypatch.setattr(MeanMetric, "update", lambda self, value, weight: given.extend([value, weight]))
    classifier = ImageClassifier("vgg13", num_classes=10).to("meta")
    classifier.training_step((torch.zeros(4, 3, 32, 32, device="meta"), torch.zeros(4, device="meta").long()), 0)
    assert [(part.device.type, part.ndim) for part in given] == [("meta", 0)] * 2


def test_hyperparameters_store_the_class_path(tmp_path) -> None:
    spec = {"class_path": "torchvision.models.resnet18", "init_args": {"zero_init_residual": True}}
    classifier = ImageClassifier(spec, num_classes=5)
    assert classifier.network.fc.out_features == 5
    trainer = quiet_trainer(tmp_path, limit_train_batches=1)
    trainer.fit(classifier, batches())
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "file.ckpt", weights_only=True)
    assert again.hparams.network == spec
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), classifier.eval()(images))


def test_a_network_that_was_passed_as_a_module_must_be_passed_again(tmp_path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    classifier = ImageClassifier(network)
    trainer = quiet_trainer(tmp_path, limit_train_batches=1)
    trainer.fit(classifier, batches())
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match="passed as a module"):
        ImageClassifier.load_from_checkpoint(tmp_path / "file.ckpt", weights_only=True)
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    again = ImageClassifier.load_from_checkpoint(tmp_path / "file.ckpt", weights_only=True, network=fresh)
    assert torch.equal(again.network[1].weight, network[1].weight)


def test_the_loss_is_the_cross_entropy_at_the_temperature() -> None:
    classifier = ImageClassifier("vgg13", temperature=5.0).eval()
    images, labels = next(iter(batches()))
    expected = F.cross_entropy(classifier(images) / 5, labels)
    assert torch.equal(classifier.training_step((images, labels), 0), expected)


def test_logged_metrics_equal_those_of_a_plain_loop(tmp_path) -> None:
    torch.manual_seed(0)
    classifier = ImageClassifier("vgg13")
    loader = batches(number=3, size=4)
    results = quiet_trainer(tmp_path).test(classifier, loader, verbose=False)[0]
    classifier.eval()
    with torch.no_grad():
        logits = torch.cat([classifier(images) for images, _ in loader])
    labels = torch.cat([labels for _, labels in loader])
    assert results["test_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert results["test_loss"] == pytest.approx(F.cross_entropy(logits / 5, labels).item(), rel=1e-5)


def test_training_metrics_are_logged(tmp_path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.fit(ImageClassifier("vgg13"), batches(), batches())
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} <= set(trainer.callback_metrics)


def test_the_learning_rate_decreases_at_the_milestones() -> None:
    setup = ImageClassifier("vgg13", lr=0.1, milestones=[2, 3]).configure_optimizers()
    rates = []
    for _ in range(4):
        rates.append(setup["optimizer"].param_groups[0]["lr"])
        setup["optimizer"].step()
        setup["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"network": "resnet57"}, "Did you mean 'resnet56'"),
        ({"network": {"class_path": "torchvision.models.no_such"}}, "cannot import"),
        ({"network": {"class_path": "torchvision.models.resnet18", "init_args": {"wide": 3}}}, "does not take"),
        ({"network": {"class_path": "collections.OrderedDict"}}, "expected a torch.nn.Module"),
        ({"network": {"name": "x"}}, "class_path"),
        ({"network": {"class_path": "torchvision.models.resnet18", "init_args": {"num_classes": 3}}}, "10 classes"),
        ({"temperature": 0.0}, "`temperature` must be > 0"),
        ({"momentum": 1.0}, "`momentum` must be in [0, 1)"),
        ({"milestones": [5, 3]}, "ascending"),
        ({"nesterov": True, "momentum": 0.0}, "`nesterov`"),
        ({"num_classes": 1}, "at least 2"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, sentence) -> None:
    with pytest.raises(ValueError) as error:
        ImageClassifier(**settings)
    assert sentence in str(error.value)


def test_the_file_to_start_from_is_not_a_hyperparameter(tmp_path) -> None:
    first = ImageClassifier("vgg13")
    torch.save({"state_dict": first.state_dict()}, tmp_path / "weights.ckpt")
    second = ImageClassifier("vgg13", pretrained=str(tmp_path / "weights.ckpt"))
    assert "pretrained" not in second.hparams
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )

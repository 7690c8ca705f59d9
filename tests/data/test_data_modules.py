"""The data modules on real images: labels, order, splits, seeds, and messages for missing data."""

import contextlib
import inspect
import io
import os

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.cli import LightningArgumentParser
from real_images import class_names, real_images, shuffled, write_cifar10, write_cifar100, write_image_folder
from sklearn.datasets import load_digits
from torch import nn
from torchvision import datasets, transforms

import gflow_pl.data
from gflow_pl.data import CIFAR10, CIFAR100, Digits, ImageFolder
from gflow_pl.data.augment import normalize

REFERENCE = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])


def make(name, root, monkeypatch, **options):
    if name == "CIFAR10":
        return CIFAR10(write_cifar10(root, monkeypatch), **options)
    if name == "CIFAR100":
        return CIFAR100(write_cifar100(root, monkeypatch), **options)
    if name == "ImageFolder":
        return ImageFolder(write_image_folder(root), **{"num_workers": 0, **options})
    return getattr(gflow_pl.data, name)(**options)


@pytest.fixture(params=gflow_pl.data.__all__)
def module(request, tmp_path, monkeypatch):
    """Every public data module, with a way to make another one over the same files."""
    first = make(request.param, tmp_path, monkeypatch)
    return lambda **options: type(first)(
        **({"root": first.root} if hasattr(first, "root") else {}), num_workers=0, **options
    )


def batches(loader):
    return [(x.clone(), y.clone()) for x, y in loader]


def joined(loader):
    xs, ys = zip(*loader, strict=True)
    return torch.cat(xs), torch.cat(ys)


def as_inputs(images):
    return torch.stack([REFERENCE(Image.fromarray(image)) for image in images])


# Every data module.


def test_batches_are_normalised_float_images_with_labels_of_the_classes(module):
    data = module(batch_size=32)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        x, y = next(iter(loader))
        assert x.shape[1:] == (3, data.image_size, data.image_size)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert len(x) == len(y) <= 32
        assert -1 <= x.min() < x.max() <= 1
    assert int(joined(data.test_dataloader())[1].max()) < data.num_classes == len(data.class_names)


def test_the_same_seed_gives_the_same_epochs_and_another_seed_does_not(module):
    def two_epochs(seed):
        pl.seed_everything(seed, verbose=False)
        loader = module().train_dataloader()
        return batches(loader), batches(loader)

    first, again, other = two_epochs(0), two_epochs(0), two_epochs(1)
    for epoch, same in zip(first, again, strict=True):
        assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(epoch, same, strict=True))
    assert not torch.equal(first[0][0][0], other[0][0][0])
    assert not torch.equal(first[0][0][0], first[1][0][0])


def test_an_epoch_can_be_repeated_from_the_random_state_at_its_start(module):
    loader = module(batch_size=20).train_dataloader()
    batches(loader)
    state = torch.get_rng_state()
    second = batches(loader)
    torch.manual_seed(99)
    resumed = module(batch_size=20).train_dataloader()
    torch.set_rng_state(state)
    for (x, y), (u, v) in zip(second, batches(resumed), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_without_a_fraction_validation_is_on_the_test_images(module):
    data = module()
    for a, b in zip(joined(data.val_dataloader()), joined(data.test_dataloader()), strict=True):
        assert torch.equal(a, b)


def test_images_held_out_are_the_rest_of_the_training_images(module):
    whole = module()
    data = module(val_fraction=0.2, seed=5)

    def rows(*loaders):
        return sorted(
            (image.numpy().tobytes(), int(y))
            for loader in loaders
            for x, ys in loader
            for image, y in zip(x, ys, strict=True)
        )

    assert rows(data.plain_train_dataloader(), data.val_dataloader()) == rows(whole.plain_train_dataloader())
    val, _ = joined(data.val_dataloader())
    assert len(val) == round(0.2 * len(joined(whole.plain_train_dataloader())[1]))
    assert not torch.equal(val, joined(module(val_fraction=0.2, seed=6).val_dataloader())[0])
    assert torch.equal(val, joined(module(val_fraction=0.2, seed=5).val_dataloader())[0])
    assert torch.equal(joined(data.test_dataloader())[0], joined(whole.test_dataloader())[0])


def test_plain_training_images_are_in_order_and_not_augmented(module):
    data = module(batch_size=16)
    first, labels = joined(data.plain_train_dataloader())
    again, _ = joined(data.plain_train_dataloader())
    assert torch.equal(first, again)
    shuffled_labels = joined(data.train_dataloader())[1]
    assert not torch.equal(labels, shuffled_labels)
    assert torch.equal(labels.sort().values, shuffled_labels.sort().values)


def test_predictions_have_as_many_names_as_rows(module):
    data = module()
    assert len(data.predict_names()) == len(set(data.predict_names())) == len(joined(data.predict_dataloader())[1])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, r"`batch_size` must be at least 1, got 0\."),
        ({"val_fraction": 10}, r"`val_fraction` must be in \[0, 1\), got 10. It is a fraction: for 10 % write 0.1\."),
        ({"val_fraction": -0.1}, r"`val_fraction` must be in \[0, 1\), got -0\.1"),
        ({"num_workers": -1}, r"`num_workers` must be at least 0, or null for a default, got -1\."),
    ],
)
def test_settings_out_of_range_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Digits(**options)


def test_a_fraction_that_holds_out_no_image_is_refused(tmp_path):
    data = ImageFolder(write_image_folder(tmp_path, per_class=1), num_workers=0, val_fraction=0.01)
    with pytest.raises(ValueError, match=r"`val_fraction` 0\.01 holds out 0 of 10 training images"):
        data.setup()


def test_batches_of_worker_processes_follow_the_seed(tmp_path):
    root = write_image_folder(tmp_path, per_class=2)

    def epoch():
        pl.seed_everything(3, verbose=False)
        return batches(ImageFolder(root, num_workers=2, batch_size=8).train_dataloader())

    first, again = epoch(), epoch()
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, again, strict=True))
    xs = torch.cat([x for x, _ in first])
    assert len({x.numpy().tobytes() for x in xs}) == 20


def test_workers_are_for_files_only(tmp_path):
    assert Digits().num_workers == CIFAR10(tmp_path).num_workers == 0
    folder = ImageFolder(write_image_folder(tmp_path, per_class=1))
    assert 1 <= folder.num_workers <= min(4, os.cpu_count())


def test_ranks_of_a_trainer_shift_their_images_independently(module):
    data = module()
    data.trainer = type("Trainer", (), {"global_rank": 2, "world_size": 3})()
    assert data.train_dataloader().collate_fn.rank == 2


@pytest.mark.parametrize("name", gflow_pl.data.__all__)
def test_every_setting_is_a_documented_option_of_the_command_line(name):
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(getattr(gflow_pl.data, name), "data")
    has_root = "root" in inspect.signature(getattr(gflow_pl.data, name)).parameters
    root = ["--data.root=somewhere"] if has_root else []
    values = parser.parse_args(
        [*root, "--data.batch_size=64", "--data.val_fraction=0.1", "--data.num_workers=null"]
    ).data
    assert (values.batch_size, values.val_fraction, values.num_workers, values.seed) == (64, 0.1, None, 0)
    text = " ".join(parser.format_help().split())
    assert "With 0, as published, the validation images are the test images" in text
    assert text.count("Worker processes of a loader") == 1
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit):
        parser.parse_args([*root, "--data.batchsize=64"])
    assert "batchsize" in stderr.getvalue()


# CIFAR-10 and CIFAR-100, in torchvision's own files.


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_images_labels_and_order_are_those_of_the_files(tmp_path, monkeypatch, name):
    data = make(name, tmp_path, monkeypatch, batch_size=16)
    data.prepare_data()
    for split, loader in (("train", data.plain_train_dataloader()), ("test", data.test_dataloader())):
        x, y = joined(loader)
        images, labels = shuffled(split)
        assert torch.equal(x, as_inputs(images))
        assert y.tolist() == labels.tolist()
    assert data.num_classes == {"CIFAR10": 10, "CIFAR100": 100}[name]
    assert data.class_names[:10] == class_names()
    assert data.predict_names()[:3] == ["0", "1", "2"]


def test_training_images_are_shifted_and_mirrored(tmp_path, monkeypatch):
    data = CIFAR10(write_cifar10(tmp_path, monkeypatch))
    plain = {x.numpy().tobytes() for x in joined(data.plain_train_dataloader())[0]}
    torch.manual_seed(0)
    augmented = [x.numpy().tobytes() in plain for x in joined(data.train_dataloader())[0]]
    assert sum(augmented) < 5


@pytest.mark.parametrize("cls", [CIFAR10, CIFAR100])
def test_missing_data_is_refused_with_ways_to_get_it(tmp_path, cls):
    data = cls(tmp_path / "nowhere")
    for attempt in (data.check_data, data.prepare_data, data.setup, data.train_dataloader):
        with pytest.raises(
            ValueError, match=r"the data is not in '.*nowhere/cifar-10.*'\. Set --data.download=true .*tar\.gz"
        ):
            attempt()
    assert not list(tmp_path.iterdir())


def test_damaged_data_is_refused_in_one_sentence(tmp_path, monkeypatch):
    data = CIFAR10(write_cifar10(tmp_path, monkeypatch))
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"something else")
    with pytest.raises(
        ValueError, match=r"^CIFAR10: the data is damaged or incomplete in '.*cifar-10-batches-py'\. Set"
    ):
        data.setup()


def test_data_is_downloaded_only_on_request_and_a_failure_is_one_sentence(tmp_path, monkeypatch):
    calls = []

    def no_connection(self):
        calls.append(self.root)
        raise OSError("no connection")

    monkeypatch.setattr(datasets.CIFAR10, "download", no_connection)
    with pytest.raises(ValueError, match="download=true"):
        CIFAR10(tmp_path).prepare_data()
    assert calls == []
    with pytest.raises(ValueError, match=r"the data could not be downloaded \(no connection\)"):
        CIFAR10(tmp_path, download=True).prepare_data()
    assert calls == [str(tmp_path)]


class Linear(pl.LightningModule):
    def __init__(self, num_classes):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
        self.seen = []

    def training_step(self, batch, batch_index):
        x, y = batch
        self.seen += y.tolist()
        return nn.functional.cross_entropy(self.network(x), y)

    def validation_step(self, batch, batch_index):
        self.log("val_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "ImageFolder"])
def test_a_trainer_runs_an_epoch(tmp_path, monkeypatch, name):
    data = make(name, tmp_path / "data", monkeypatch, batch_size=16)
    model = Linear(data.num_classes)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule=data)
    assert sorted(model.seen) == sorted(real_images()[1].tolist())
    assert trainer.callback_metrics["val_loss"].isfinite()


# Image folders.


def test_an_image_folder_lists_its_classes_and_reads_every_file(tmp_path):
    data = ImageFolder(write_image_folder(tmp_path, num_classes=7), num_workers=0)
    assert data.num_classes == 7
    assert data.class_names == class_names()[:7]
    x, y = joined(data.test_dataloader())
    assert torch.equal(x, as_inputs(real_images("test")[0][:14]))
    assert y.tolist() == np.repeat(np.arange(7), 2).tolist()
    assert data.predict_names()[:3] == ["test/apple/00.png", "test/apple/01.png", "test/aquarium_fish/00.png"]


def test_images_of_another_size_are_resized_and_cropped_to_their_centre(tmp_path):
    root = write_image_folder(tmp_path, per_class=1, num_classes=2, scale=2)
    assert ImageFolder(root, image_size=64, num_workers=0).test_dataloader().dataset[0][0].shape == (3, 64, 64)
    # Halving an image with doubled pixels restores it, up to the blur of the filter.
    halved = ImageFolder(root, image_size=32, num_workers=0).test_dataloader().dataset[0][0]
    original = torch.from_numpy(real_images("test")[0][0]).permute(2, 0, 1)
    assert (halved.int() - original.int()).abs().float().mean() < 4
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200
    Image.fromarray(wide).save(tmp_path / "test" / "apple" / "00.png")
    centre = ImageFolder(root, image_size=40, num_workers=0).test_dataloader().dataset[0][0]
    assert bool((centre == 200).all())


def test_grey_and_palette_images_become_colour_images(tmp_path):
    root = write_image_folder(tmp_path, per_class=1, num_classes=2)
    file = root / "test" / "apple" / "00.png"
    Image.open(file).convert("L").save(file)
    image, _ = ImageFolder(root, num_workers=0).test_dataloader().dataset[0]
    assert image.shape == (3, 32, 32)
    assert torch.equal(image[0], image[1])


def test_image_folders_with_missing_parts_are_refused_at_construction(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder '.*none': expected train/ and test/ .*--data\.root"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"' has no train/: expected train/ and test/"):
        ImageFolder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"train' has no class folders"):
        ImageFolder(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(
        ValueError, match=r"' has no test/: expected train/ and test/ with one folder of images for each"
    ):
        ImageFolder(tmp_path)
    (tmp_path / "test" / "dog").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"1 of the classes in '.*/train' have no folder in test/ \('cat'\)"):
        ImageFolder(tmp_path)
    (tmp_path / "test" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"1 of the classes in '.*/test' have no folder in train/ \('dog'\)"):
        ImageFolder(tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"a class in '.*train' has no images: .*cat"):
        ImageFolder(tmp_path).setup()
    with pytest.raises(ValueError, match=r"`image_size` must be at least 1 pixel, got 0"):
        ImageFolder(tmp_path, image_size=0)


def test_the_message_names_an_image_that_cannot_be_read(tmp_path):
    root = write_image_folder(tmp_path, per_class=1, num_classes=2)
    for content in (b"no image", (root / "test" / "apple" / "00.png").read_bytes()[:200]):
        (root / "test" / "apple" / "00.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"^Image '.*test/apple/00\.png' could not be read"):
            next(iter(ImageFolder(root, num_workers=0).test_dataloader()))


# Digits.


def test_digits_are_those_of_scikit_learn_with_a_fifth_for_testing():
    data = Digits()
    train, train_labels = joined(data.plain_train_dataloader())
    test, test_labels = joined(data.test_dataloader())
    assert (len(train), len(test)) == (1442, 355)
    digits = load_digits()
    expected = {}
    for image, label in zip(digits.images, digits.target, strict=True):
        large = np.asarray(Image.fromarray(image.astype(np.float32)).resize((32, 32), Image.Resampling.BILINEAR))
        expected[normalize(torch.from_numpy((large * (255 / 16)).round())).numpy().tobytes()] = int(label)
    assert len(expected) == 1797
    for image, label in zip(torch.cat([train, test]), torch.cat([train_labels, test_labels]), strict=True):
        assert expected.pop(image[0].numpy().tobytes()) == label
    assert not expected
    share = torch.bincount(test_labels) / torch.bincount(torch.from_numpy(digits.target))
    assert bool(((share - 0.2).abs() < 0.01).all())


def test_digits_are_three_equal_channels_and_not_augmented():
    data = Digits()
    plain = {x.numpy().tobytes() for x in joined(data.plain_train_dataloader())[0]}
    images = joined(data.train_dataloader())[0]
    assert torch.equal(images[:, 0], images[:, 2])
    assert {x.numpy().tobytes() for x in images} == plain

"""Copies of loaders: any training data can be scored on, and the loaders of training do not change."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    get_worker_info,
)

sys.path.insert(0, str(Path(__file__).parent))
from pruning_runs import prune
from small_nets import SmallModule, images, trainer

# Data sets


class KeyedDataset(Dataset):
    """Images that have names instead of indices."""

    def __init__(self) -> None:
        self.images = {f"image {k}": image for k, image in enumerate(images(64))}

    def __getitem__(self, key):
        return self.images[key]

    def __len__(self):
        return len(self.images)


class DatasetWithKeys(KeyedDataset):
    def keys(self):
        return self.images.keys()


class KeySampler(Sampler):
    def __init__(self, names) -> None:
        self.names = list(names)

    def __len__(self):
        return len(self.names)

    def __iter__(self):
        return iter(random.sample(self.names, len(self.names)))


@pytest.mark.parametrize(
    ("dataset", "keys"),
    [
        (DatasetWithKeys(), KeyedDataset().images),
        (KeyedDataset().images, KeyedDataset().images),
        ({3 * k: image for k, image in enumerate(images(64))}, range(0, 192, 3)),
    ],
    ids=["data set with keys", "dict", "dict of numbers with gaps"],
)
def test_data_sets_with_keys_are_scored(dataset, keys, tmp_path) -> None:
    _, pruning = prune(tmp_path, DataLoader(dataset, batch_size=16, sampler=KeySampler(keys)))
    assert pruning.finished


def test_a_data_set_with_unknown_keys_is_refused_before_the_first_step(tmp_path) -> None:
    steps = []

    class Counts(SmallModule):
        def on_train_batch_start(self, batch, batch_idx):
            steps.append(batch_idx)

    data = DataLoader(KeyedDataset(), batch_size=16, sampler=KeySampler(KeyedDataset().images))
    with pytest.raises(
        ValueError, match=r"'?KeyedDataset'? cannot be read by index \(KeyError: \d+\).*give it a method `keys`"
    ):
        prune(tmp_path, data, Counts())
    assert not steps


def test_map_style_data_without_a_length_is_refused(tmp_path) -> None:
    class Endless(Dataset):
        def __getitem__(self, index):
            return images(64)[index]

    data = DataLoader(Endless(), batch_size=16, sampler=KeySampler(range(64)))
    with pytest.raises(ValueError, match=r"the data set Endless has no length.*give it `__len__`"):
        prune(tmp_path, data)


def test_validation_data_with_unknown_keys_leaves_the_accuracy_empty(tmp_path) -> None:
    val = DataLoader(KeyedDataset(), batch_size=16, sampler=KeySampler(KeyedDataset().images))
    _, pruning = prune(tmp_path, DataLoader(images(64), batch_size=16, shuffle=True), val=val)
    assert [row["accuracy_after_cut"] for row in pruning.rows] == ["", ""]


class BatchesOfSixteen(BatchSampler):
    """A batch sampler without an attribute `batch_size`."""

    def __init__(self):
        pass

    def __len__(self):
        return 4

    def __iter__(self):
        return iter(torch.randperm(64).view(4, 16).tolist())


@pytest.mark.parametrize("sampler", [BatchSampler(RandomSampler(range(64)), 16, drop_last=False), BatchesOfSixteen()])
def test_a_batch_sampler_passed_as_sampler_keeps_its_batch_size(sampler, tmp_path) -> None:
    class Whole(Dataset):
        """A data set that returns whole batches, for lists of indices (`batch_size=None`)."""

        asked: set

        def __init__(self):
            self.asked = set()

        def __len__(self):
            return 64

        def __getitem__(self, positions):
            self.asked.add(len(positions))
            return images(64)[positions]

    data = Whole()
    _, pruning = prune(tmp_path, DataLoader(data, batch_size=None, sampler=sampler))
    assert pruning.finished
    assert data.asked == {16}


class OpenedInWorkers(Dataset):
    """A data set that is opened by `worker_init_fn`, so that only workers can read it."""

    opened = None

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return self.opened[index]

    @staticmethod
    def open(_):
        get_worker_info().dataset.opened = images(64)


class NoisyDataset(Dataset):
    """A data set with its own random generator, whose state the workers copy from the main process."""

    def __init__(self):
        self.random = np.random.default_rng(0)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        x, y = images(64)[index]
        return x + 0.1 * float(self.random.normal()), y


def test_no_item_is_read_in_the_main_process(tmp_path) -> None:
    data = DataLoader(OpenedInWorkers(), batch_size=16, num_workers=1, worker_init_fn=OpenedInWorkers.open)
    _, pruning = prune(tmp_path, data, val=data)
    assert pruning.finished

    own = NoisyDataset()
    before = own.random.bit_generator.state
    _, pruning = prune(tmp_path, DataLoader(own, batch_size=16, num_workers=1, shuffle=True))
    assert pruning.finished
    assert own.random.bit_generator.state == before


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_data_set_are_reworded_only_under_a_custom_sampler(workers, tmp_path) -> None:
    class Broken(KeyedDataset):
        def __getitem__(self, index):
            raise KeyError("no such file")

    with pytest.raises(KeyError, match="no such file"):
        prune(tmp_path, DataLoader(Broken(), batch_size=16, shuffle=True, num_workers=workers))
    foreign = DataLoader(Broken(), batch_size=16, sampler=KeySampler(range(64)), num_workers=workers)
    with pytest.raises(ValueError, match=r"cannot be read by index \(KeyError: 'no such file'\), so"):
        prune(tmp_path, foreign)


@pytest.mark.parametrize("batched", [False, True])
def test_scoring_and_validation_use_only_the_subset_of_a_subset_random_sampler(batched, tmp_path) -> None:
    """Samplers split one data set: its first quarter, which is much brighter, is for validation."""
    data, seen = images(64), []
    data.tensors[0][:16] = 100.0
    data.tensors[1][:16] = 1

    class Sees(SmallModule):
        def training_step(self, batch, batch_idx):
            seen.append(float(batch[0].max()))
            return super().training_step(batch, batch_idx)

        def forward(self, x):
            logits = super().forward(x)
            return logits + 1000 * torch.eye(4)[1] if float(x.min()) == 100 else logits

    def part(indices):
        sampler = SubsetRandomSampler(list(indices))
        if batched:
            return DataLoader(data, batch_sampler=BatchSampler(sampler, 16, drop_last=False))
        return DataLoader(data, batch_size=16, sampler=sampler)

    _, pruning = prune(tmp_path, part(range(16, 64)), Sees(), part(range(16)), num_samples=64)
    assert max(seen) < 100
    assert [row["accuracy_after_cut"] for row in pruning.rows] == [1.0, 1.0]


def test_a_custom_sampler_is_reported_once(tmp_path, caplog) -> None:
    custom = DataLoader(images(64), batch_size=16, sampler=KeySampler(range(16)))
    with caplog.at_level("INFO"):
        _, pruning = prune(tmp_path, custom, val=custom)
        assert pruning.finished
    lines = [r.getMessage() for r in caplog.records if "custom sampler KeySampler is ignored" in r.getMessage()]
    assert len(lines) == 2
    assert "filters are scored on the whole data set" in lines[0]
    assert "accuracy after a cut is measured on the whole data set" in lines[1]
    caplog.clear()
    with caplog.at_level("INFO"):
        prune(tmp_path, DataLoader(images(64), batch_size=16, shuffle=True), val=DataLoader(images(64), batch_size=16))
    assert "sampler" not in caplog.text


# Custom loaders


class CustomLoader:
    """A custom train loader with every kind of state that an iteration may change."""

    def __init__(self) -> None:
        self.data = images(64)
        self.order = list(range(64))
        self.random = random.Random(0)
        self.numpy = np.random.default_rng(0)
        self.torch = torch.Generator().manual_seed(0)
        self.epochs = 0

    def __len__(self):
        return 4

    def __iter__(self):
        self.epochs += 1
        self.random.shuffle(self.order)
        for k in range(4):
            x, y = self.data[self.order[16 * k : 16 * k + 16]]
            noise = torch.randn(x.shape, generator=self.torch) + float(self.numpy.normal())
            yield x + 0.1 * noise, y


class LoaderAroundADataLoader(CustomLoader):
    """A custom loader that iterates a DataLoader, whose workers persist between epochs."""

    def __init__(self, num_workers: int = 1) -> None:
        self.inner = DataLoader(
            images(64),
            batch_size=16,
            shuffle=True,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self):
        yield from self.inner


class LoaderAroundSeveral(LoaderAroundADataLoader):
    """A custom loader that iterates several DataLoaders in nested containers, one after the other."""

    def __init__(self) -> None:
        super().__init__(num_workers=0)
        one = self.inner
        super().__init__(num_workers=0)
        self.inner = {"some": [(one, random.Random(0))], "more": (self.inner,)}

    def __len__(self):
        return 8

    def __iter__(self):
        (one, generator), more = self.inner["some"][0], self.inner["more"][0]
        for batch in (*one, *more):
            yield batch[0] + generator.random(), batch[1]


@pytest.mark.parametrize("kind", [CustomLoader, LoaderAroundADataLoader, LoaderAroundSeveral])
def test_scoring_does_not_change_a_custom_train_loader(kind, tmp_path) -> None:
    """A run whose cuts remove no filter trains on the same batches as a run without cuts."""
    one, pruning = prune(tmp_path, kind(), fraction=0.001, epochs=[0, 2], keep_momentum=True)
    assert [row["filters_removed"] for row in pruning.rows] == [0, 0]
    pl.seed_everything(0)
    two = SmallModule(dropout=0.2)
    trainer(tmp_path).fit(two, kind())
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    _, pruning = prune(tmp_path, {"a": kind()}, ModuleForDictBatches())
    assert pruning.finished


class ModuleForDictBatches(SmallModule):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 3, 8, 8)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


def test_a_train_loader_that_is_an_iterator_is_refused(tmp_path) -> None:
    batches = iter(list(DataLoader(images(64), batch_size=16)))
    with pytest.raises(ValueError, match=r"is an iterator.*give a DataLoader"):
        prune(tmp_path, batches, batches=1)

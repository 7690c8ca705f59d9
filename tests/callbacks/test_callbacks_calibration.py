"""The batches that scores are taken from: any training data, moved and augmented as in training, the loader left alone."""

import copy
import logging
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger, Logger
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
)

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule, images, trainer

from gflow_pl import PruningCallback


def prune(folder, data, module=None, val=None, **options) -> tuple[pl.LightningModule, PruningCallback]:
    pl.seed_everything(0)
    module = module or SmallModule(dropout=0.2)
    settings = {"measure": "loss", "fraction": 0.5, "rounds": 2, "num_samples": 32}
    pruning = PruningCallback(**{**settings, **options})
    trainer(folder, callbacks=[pruning]).fit(module, data, val)
    return module, pruning


# Data sets


class Keyed(Dataset):
    """Images that are asked for by name."""

    def __init__(self) -> None:
        self.images = {f"image {k}": image for k, image in enumerate(images(64))}

    def __getitem__(self, key):
        return self.images[key]

    def __len__(self):
        return len(self.images)


class Listed(Keyed):
    def keys(self):
        return self.images.keys()


class Names(Sampler):
    def __init__(self, names) -> None:
        self.names = list(names)

    def __len__(self):
        return len(self.names)

    def __iter__(self):
        return iter(random.sample(self.names, len(self.names)))


@pytest.mark.parametrize(
    ("dataset", "keys"),
    [
        (Listed(), Keyed().images),
        (Keyed().images, Keyed().images),
        ({3 * k: image for k, image in enumerate(images(64))}, range(0, 192, 3)),
    ],
    ids=["data set with keys", "dict", "dict of numbers with gaps"],
)
def test_data_that_is_asked_for_by_key_is_scored_on(dataset, keys, tmp_path) -> None:
    _, pruning = prune(tmp_path, DataLoader(dataset, batch_size=16, sampler=Names(keys)))
    assert pruning.finished


def test_data_whose_keys_nobody_lists_is_refused_before_the_first_step(tmp_path) -> None:
    steps = []

    class Counts(SmallModule):
        def on_train_batch_start(self, batch, batch_idx):
            steps.append(batch_idx)

    data = DataLoader(Keyed(), batch_size=16, sampler=Names(Keyed().images))
    with pytest.raises(
        ValueError, match=r"'?Keyed'? cannot be read by index \(KeyError: \d+\).*give it a method `keys`"
    ):
        prune(tmp_path, data, Counts())
    assert not steps


def test_map_style_data_without_a_length_is_refused(tmp_path) -> None:
    class Endless(Dataset):
        def __getitem__(self, index):
            return images(64)[index]

    data = DataLoader(Endless(), batch_size=16, sampler=Names(range(64)))
    with pytest.raises(ValueError, match=r"the data set Endless has no length.*give it `__len__`"):
        prune(tmp_path, data)


def test_validation_data_that_cannot_be_read_again_only_costs_the_accuracy(tmp_path) -> None:
    val = DataLoader(Keyed(), batch_size=16, sampler=Names(Keyed().images))
    _, pruning = prune(tmp_path, DataLoader(images(64), batch_size=16, shuffle=True), val=val)
    assert [row["accuracy_after_cut"] for row in pruning.rows] == ["", ""]


class OfSixteen(BatchSampler):
    """Tells no size."""

    def __init__(self):
        pass

    def __len__(self):
        return 4

    def __iter__(self):
        return iter(torch.randperm(64).view(4, 16).tolist())


@pytest.mark.parametrize("sampler", [BatchSampler(RandomSampler(range(64)), 16, drop_last=False), OfSixteen()])
def test_a_sampler_that_gives_whole_batches_keeps_their_size(sampler, tmp_path) -> None:
    class Whole(Dataset):
        """Batches are asked for at once: `batch_size=None`, a sampler that gives lists."""

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


class OfItsWorker(Dataset):
    """Opened by `worker_init_fn`, in the workers and nowhere else."""

    opened = None

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return self.opened[index]

    @staticmethod
    def open(_):
        get_worker_info().dataset.opened = images(64)


class DrawsByItself(Dataset):
    """Has random numbers of its own, whose state the workers take from the main process."""

    def __init__(self):
        self.random = np.random.default_rng(0)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        x, y = images(64)[index]
        return x + 0.1 * float(self.random.normal()), y


def test_no_example_is_read_in_the_process_that_trains(tmp_path) -> None:
    data = DataLoader(OfItsWorker(), batch_size=16, num_workers=1, worker_init_fn=OfItsWorker.open)
    _, pruning = prune(tmp_path, data, val=data)
    assert pruning.finished

    own = DrawsByItself()
    before = own.random.bit_generator.state
    _, pruning = prune(tmp_path, DataLoader(own, batch_size=16, num_workers=1, shuffle=True))
    assert pruning.finished
    assert own.random.bit_generator.state == before


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_data_that_torch_itself_asks_is_the_data_sets_own(workers, tmp_path) -> None:
    class Broken(Keyed):
        def __getitem__(self, index):
            raise KeyError("no such file")

    with pytest.raises(KeyError, match="no such file"):
        prune(tmp_path, DataLoader(Broken(), batch_size=16, shuffle=True, num_workers=workers))
    foreign = DataLoader(Broken(), batch_size=16, sampler=Names(range(64)), num_workers=workers)
    with pytest.raises(ValueError, match=r"cannot be read by index \(KeyError: 'no such file'\), so"):
        prune(tmp_path, foreign)


@pytest.mark.parametrize("batched", [False, True])
def test_a_subset_that_a_sampler_of_torch_draws_from_is_all_that_is_measured_on(batched, tmp_path) -> None:
    """One data set, parted by samplers: the first quarter, of another brightness, is for validation."""
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


def test_that_a_sampler_of_somebodys_own_is_not_followed_is_said_once(tmp_path, caplog) -> None:
    own = DataLoader(images(64), batch_size=16, sampler=Names(range(16)))
    with caplog.at_level("INFO"):
        _, pruning = prune(tmp_path, own, val=own)
        assert pruning.finished
    lines = [r.getMessage() for r in caplog.records if "custom sampler Names is ignored" in r.getMessage()]
    assert len(lines) == 2
    assert "filters are scored on the whole data set" in lines[0]
    assert "accuracy after a cut is measured on the whole data set" in lines[1]
    caplog.clear()
    with caplog.at_level("INFO"):
        prune(tmp_path, DataLoader(images(64), batch_size=16, shuffle=True), val=DataLoader(images(64), batch_size=16))
    assert "sampler" not in caplog.text


# Loaders of other kinds


class Loader:
    """A train loader of somebody's own, with all the state that going through it may change."""

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


class Around(Loader):
    """Goes through a DataLoader, whose workers live on between epochs."""

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


class Several(Around):
    """Goes through several of them, one after the other."""

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


@pytest.mark.parametrize("kind", [Loader, Around, Several])
def test_a_train_loader_of_somebodys_own_is_left_alone(kind, tmp_path) -> None:
    """A run whose cuts take nothing trains on the very batches of a run without any."""
    one, pruning = prune(tmp_path, kind(), fraction=0.001, epochs=[0, 2], keep_momentum=True)
    assert [row["filters_removed"] for row in pruning.rows] == [0, 0]
    pl.seed_everything(0)
    two = SmallModule(dropout=0.2)
    trainer(tmp_path).fit(two, kind())
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    _, pruning = prune(tmp_path, {"a": kind()}, TakesOneOfADict())
    assert pruning.finished


class TakesOneOfADict(SmallModule):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 3, 8, 8)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


def test_a_train_loader_that_is_an_iterator_is_refused(tmp_path) -> None:
    batches = iter(list(DataLoader(images(64), batch_size=16)))
    with pytest.raises(ValueError, match=r"is an iterator.*give a DataLoader"):
        prune(tmp_path, batches, batches=1)


# From the loader to the module

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def hook(name: str):
    """Adds its power of ten to the images, and leaves the rest to Lightning."""

    def run(self, batch, *arguments):
        if name == "transfer_batch_to_device":
            batch = super(type(self), self).transfer_batch_to_device(batch, *arguments)
        return batch[0] + 10.0 ** (1 + HOOKS.index(name)), batch[1]

    return run


@pytest.mark.parametrize("owner", ["module", "data"])
def test_transfer_hooks_are_applied_to_what_is_scored_on(owner, tmp_path) -> None:
    seen = {"training": [], "scoring": []}

    class Sees(SmallModule):
        def training_step(self, batch, batch_idx):
            seen["training" if self.training else "scoring"].append(float(batch[0].mean()))
            return super().training_step((batch[0] / 1000, batch[1]), batch_idx)

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(images(64), batch_size=16, shuffle=True)

    hooks = {name: hook(name) for name in HOOKS}
    module = (type("Hooked", (Sees,), hooks) if owner == "module" else Sees)()
    data = (type("Hooked", (Data,), hooks) if owner == "data" else Data)()
    pruning = PruningCallback("loss", fraction=0.5, rounds=1, num_samples=32)
    trainer(tmp_path, callbacks=[pruning]).fit(module, datamodule=data)
    assert len(seen["scoring"]) >= 4
    for stage in seen.values():
        assert stage == pytest.approx([1110.0] * len(stage), abs=5)


def test_augmentation_in_a_hook_is_of_training_batches_and_not_of_validation_ones(tmp_path) -> None:
    """Both ways of asking, by the Trainer's stage and by the module's own flag, get the same answer."""
    seen = {"train": set(), "val": set()}

    class Augments(SmallModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            kind = "val" if float(batch[0].mean()) > 100 else "train"
            seen[kind].add((self.trainer.training, self.training, self.trainer.validating))
            if self.trainer.training and self.training:
                return batch[0], torch.full_like(batch[1], 3)
            return batch

        def forward(self, x):
            return super().forward(x - 200 if float(x.mean()) > 100 else x)

    val = images(32)
    val.tensors[0].add_(200)
    pl.seed_everything(0)
    _, pruning = prune(tmp_path, DataLoader(images(64), batch_size=16), Augments(), DataLoader(val, batch_size=16))
    assert seen == {"train": {(True, True, False)}, "val": {(False, False, True)}}
    assert all(row["loss_after"] < 1 for row in pruning.rows), "measured on the labels of training"
    assert all(row["accuracy_after_cut"] == 0.25 for row in pruning.rows), "measured on the labels of validation"


def test_parts_of_a_module_that_augment_by_their_own_flag_do_so_in_training_alone(tmp_path) -> None:
    """And data that looks at it; a part that training keeps in evaluation mode stays in it."""
    seen: dict[str, set] = {"train": set(), "val": set()}

    class Mixes(nn.Module):
        def forward(self, batch):
            return (batch[0], torch.full_like(batch[1], 3)) if self.training else batch

    class Hooked(SmallModule):
        def __init__(self):
            super().__init__()
            self.mixes, self.frozen = Mixes(), nn.Dropout().eval()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            before = {m: m.training for m in self.modules()}
            assert before[self.mixes] == before[self.net] == self.trainer.training
            assert not before[self.frozen]
            return self.mixes(batch)

        def training_step(self, batch, batch_idx):
            assert batch[1].unique().tolist() == [3]
            return super().training_step(batch, batch_idx)

        def forward(self, x):
            return super().forward(x) + 1000 * torch.eye(4)[3]  # the answer is always 3

    class Looks(Dataset):
        def __init__(self, module, kind):
            self.module, self.kind = module, kind

        def __len__(self):
            return 64

        def __getitem__(self, index):
            seen[self.kind].add(self.module.mixes.training)
            return images(64)[index][0], 0

    module = Hooked()
    train, val = (DataLoader(Looks(module, kind), batch_size=16) for kind in seen)
    _, pruning = prune(tmp_path, train, module, val)
    assert seen == {"train": {True}, "val": {False}}
    assert [row["accuracy_after_cut"] for row in pruning.rows] == [0.0, 0.0]


# What scoring leaves in the logs


class Run:
    """An experiment as hosted loggers have them."""

    dir, path, number = "/somewhere", Path("/somewhere"), 3

    def __init__(self) -> None:
        self.summary, self.config, self.calls = {}, {"lr": 0.5}, []

    def get_logdir(self):
        return self.dir

    def log(self, *values):
        self.calls.append(values)
        return self


class Hosted(CSVLogger):
    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.run = Run()

    @property
    def experiment(self):
        return self.run

    def _takes(self, *_, **__):
        pass

    log_hyperparams = log_metrics = save = finalize = _takes


def test_a_training_step_finds_the_logger_that_it_knows(tmp_path) -> None:
    """Whatever a step may do with a logger and its experiment works while filters are scored, and writes nothing."""
    written = []

    class Writes(SmallModule):
        def training_step(self, batch, batch_idx):
            logger, before = self.logger, [len(kept.calls), dict(kept.summary)]
            assert isinstance(logger, Hosted)
            assert isinstance(logger, Logger)
            assert logger.save_dir == str(tmp_path)
            assert self.trainer.log_dir == logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
            run = logger.experiment
            assert os.path.join(run.dir, run.get_logdir(), run.path, "x")
            assert run.number * run.config["lr"] == 1.5
            run.summary["best"] = batch_idx
            run.config["more"] = 1
            run.log({"a": 1}).log("b")
            if not self.training:
                assert not hasattr(run, "no_such_thing")
                with run.log("c").section("d") as section:
                    section["e"].f(1)
                copy.deepcopy(logger)
                assert before == [len(kept.calls), kept.summary]
                written.append(batch_idx)
            return super().training_step(batch, batch_idx)

    pruning = PruningCallback("loss", fraction=0.5, rounds=1, num_samples=32)
    logger = Hosted(tmp_path)
    kept = logger.run
    trainer(tmp_path, callbacks=[pruning], logger=logger, max_epochs=2).fit(Writes(), DataLoader(images(64), 16))
    assert written
    assert len(kept.calls) == 16


def test_scoring_writes_nothing_to_a_loggers_experiment(tmp_path) -> None:
    written, folders = [], set()

    class Spy(CSVLogger):
        def log_image(self, key, images):
            written.append(key)

    class Writes(SmallModule):
        def training_step(self, batch, batch_idx):
            if not self.training:
                written.clear()
            self.logger.log_image("a", [])
            self.logger.experiment.log_metrics({"raw": float(len(written))})
            for logger in self.loggers:
                logger.log_metrics({"also": 1.0})
            folders.add((self.trainer.log_dir, self.logger.log_dir, self.logger.name, self.logger.version))
            if not self.training:
                assert not written
            return super().training_step(batch, batch_idx)

    pl.seed_everything(0)
    logger = Spy(tmp_path, name="mine")
    pruning = PruningCallback("loss", fraction=0.5, rounds=1, num_samples=32)
    run = trainer(tmp_path, callbacks=[pruning], logger=logger, max_epochs=2)
    module = Writes()
    run.fit(module, DataLoader(images(64), batch_size=16))
    assert run.loggers == [logger]
    assert written == ["a"] * 4, "the steps after the cut"
    assert folders == {(logger.log_dir, logger.log_dir, "mine", 0)}


def test_that_samples_are_not_balanced_is_said_once_a_fit(tmp_path, caplog) -> None:
    def loss(module, batch):
        return F.mse_loss(module(batch[0]).mean(1), batch[1])

    data = images(64)
    data = DataLoader(TensorDataset(data.tensors[0], data.tensors[1].float()), batch_size=16)

    class Regresses(SmallModule):
        def training_step(self, batch, batch_idx):
            return loss(self, batch)

    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO"):
            prune(tmp_path, data, Regresses(), measure="grasp", loss_fn=loss, rounds=3)
        assert caplog.text.count("Samples are not balanced over classes") == 1
        assert not logging.getLogger("gflow_pl.importance.score").filters

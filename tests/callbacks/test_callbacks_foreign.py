"""Training steps, loaders and metrics of users."""

import sys
from collections import deque
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule, images, trainer

from gflow_pl import GradientFlowMonitor, PruningCallback


def train(folder, module, data, *, seed: int = 0, prunes: bool = True, **options) -> PruningCallback:
    pl.seed_everything(seed)
    callback = PruningCallback(**{"measure": "loss", "fraction": 0.5, "rounds": 2, "num_samples": 32, **options})
    trainer(folder, callbacks=[callback] if prunes else []).fit(module, data)
    return callback


def shuffled(**options) -> DataLoader:
    return DataLoader(images(64), batch_size=16, shuffle=True, **options)


def step_of_one(self, batch):
    return F.cross_entropy(self(batch[0]), batch[1])


def step_of_any(self, *arguments):
    batch, _ = arguments
    return F.cross_entropy(self(batch[0]), batch[1])


def step_with_other_names(self, x, i):
    return {"loss": F.cross_entropy(self(x[0]), x[1]), "more": i}


def step_with_a_default(self, batch, batch_idx=None, scale=1.0):
    assert batch_idx is not None
    return scale * F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("step", [step_of_one, step_of_any, step_with_other_names, step_with_a_default])
def test_a_training_step_is_called_as_lightning_calls_it(step, tmp_path) -> None:
    module = type("Module", (SmallModule,), {"training_step": step})
    assert train(tmp_path, module(), shuffled()).finished


def test_a_training_step_without_a_loss_raises_an_error_that_names_loss_fn(tmp_path) -> None:
    class Skips(SmallModule):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(
        ValueError, match=r"`training_step` of Skips returned NoneType.*give the PruningCallback a `loss_fn"
    ):
        train(tmp_path, Skips(), shuffled())


class OnlyStep(pl.LightningModule):
    """An autoencoder as in Lightning's guide: it has no `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 192))

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class OnlyEmbeds(OnlyStep):
    """An autoencoder whose `forward` takes flat images, which no batch holds."""

    def forward(self, x):
        return self.encoder(x)


@pytest.mark.parametrize("cls", [OnlyStep, OnlyEmbeds])
def test_a_module_whose_forward_takes_no_batch_is_traced_by_its_training_step(cls, tmp_path) -> None:
    module = cls()
    callback = train(tmp_path, module, shuffled())
    assert callback.rows[-1]["filters_removed"] > 0
    assert module.decoder[2].out_features == 192
    assert callback.rows[-1]["filters_left"] == 72 / 2
    assert "forward" not in vars(module)


class Named(TensorDataset):
    def __getitem__(self, index):
        return dict(zip(("image", "label"), super().__getitem__(index), strict=True))


@pytest.mark.parametrize("example", [None, {"x": torch.zeros(2, 3, 8, 8)}, torch.zeros(2, 3, 8, 8)], ids=type)
def test_batches_that_are_dicts(example, tmp_path) -> None:
    """`forward` takes a part of them; an example that is a dict gives arguments by name."""

    class FromDict(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = example

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["image"]), batch["label"])

    module = FromDict()
    callback = train(tmp_path, module, DataLoader(Named(*images(64).tensors), batch_size=16))
    assert callback.rows[-1]["filters_left"] == 36 / 2
    assert set(callback.graph.frozen) == {"net.9"}, "the logits stay"


def test_a_module_that_runs_on_no_batch_raises_an_error_that_names_example_input_array(tmp_path) -> None:
    class Broken(SmallModule):
        def forward(self, x):
            raise RuntimeError("no such luck")

    with pytest.raises(ValueError, match=r"`forward` of Broken runs neither .*no such luck.*`example_input_array`"):
        train(tmp_path, Broken(), shuffled())


class ByHand(Sampler[list[int]]):
    """A batch sampler without a batch size."""

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        return iter(torch.randperm(64).view(4, 16).tolist())


class Bundles(Dataset):
    """A data set whose examples are batches."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index):
        return images(64)[16 * index : 16 * index + 16]


@pytest.mark.parametrize(
    "data",
    [
        lambda: DataLoader(images(64), batch_sampler=ByHand()),
        lambda: DataLoader(Bundles(), batch_size=None),
        lambda: DataLoader(images(64), batch_size=24, drop_last=True, shuffle=True),
    ],
    ids=["batch sampler", "batches", "drop last"],
)
def test_calibration_batches_have_the_sizes_of_training_batches(data, tmp_path) -> None:
    sizes: dict[bool, set[int]] = {True: set(), False: set()}

    class Watches(SmallModule):
        def training_step(self, batch, batch_idx):
            sizes[self.training].add(len(batch[0]))
            return super().training_step(batch, batch_idx)

    callback = train(tmp_path, Watches(), data(), num_samples=32)
    assert callback.finished
    assert sizes[False] == sizes[True]


def test_persistent_workers_are_not_restarted(tmp_path) -> None:
    """Scoring must not create an iterator of the train loader, which would restart its workers."""

    def weights(prunes: bool) -> dict[str, torch.Tensor]:
        pl.seed_everything(1)
        module = SmallModule(dropout=0.2)
        callback = train(
            tmp_path,
            module,
            shuffled(num_workers=1, persistent_workers=True),
            prunes=prunes,
            fraction=0.001,
            keep_momentum=True,
        )
        assert callback.rounds_done == 2 * prunes
        return module.state_dict()

    with_rounds, without = weights(True), weights(False)
    assert all(torch.equal(value, without[name]) for name, value in with_rounds.items())


@pytest.mark.parametrize("logged", [True, False])
def test_scoring_does_not_update_the_metrics_of_training(logged, tmp_path) -> None:
    """Also in a collection whose members share their state."""

    class Counts(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            metrics = [MulticlassAccuracy(4, average="micro"), MulticlassPrecision(4), MulticlassRecall(4)]
            self.metrics, self.seen = MetricCollection(metrics), []

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            self.metrics.update(logits, batch[1])
            if logged:
                self.log_dict(self.metrics, on_epoch=True, on_step=False)
            return F.cross_entropy(logits, batch[1])

        def on_train_epoch_end(self):
            values = self.trainer.callback_metrics if logged else self.metrics.compute()
            self.seen.append({name: float(value) for name, value in values.items()})
            if not logged:
                self.metrics.reset()

    one, two = Counts(), Counts()
    two.load_state_dict(one.state_dict())
    train(tmp_path, one, shuffled(), fraction=0.001, keep_momentum=True)
    train(tmp_path, two, shuffled(), prunes=False)
    assert one.seen == two.seen
    assert len(one.seen[-1]) >= 3


class Remembers(SmallModule):
    """A module whose steps store their results in lists, counters, buffers and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.losses, self.steps, self.newest, self.counts = [], 0, deque(maxlen=3), {"steps": 0}
        self.center, self.plain = nn.Buffer(torch.zeros(3)), torch.zeros(3)
        self.net[0].calls = 0
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        self.newest.append(float(loss.detach()))
        self.steps += 1
        self.counts["steps"] += 1
        self.net[0].calls += 1
        mean = batch[0].mean(dim=(0, 2, 3))
        self.center.lerp_(mean, 0.1)
        self.plain = self.plain + mean
        return loss

    def on_train_epoch_end(self):
        numbers = [len(self.losses), self.steps, self.counts["steps"], self.net[0].calls, *self.newest]
        self.seen.append([*numbers, *self.center.tolist(), *self.plain.tolist()])
        self.losses.clear()


@pytest.mark.parametrize("options", [{}, {"measure": "grasp"}, {"measure": "grasp", "track": True}], ids=str)
def test_scoring_does_not_change_what_a_training_step_stores(options, tmp_path) -> None:
    one, two = Remembers(), Remembers()
    two.load_state_dict(one.state_dict())
    train(tmp_path, one, shuffled(), fraction=0.001, keep_momentum=True, **options)
    train(tmp_path, two, shuffled(), prunes=False)
    assert one.seen == two.seen
    assert one.seen[-1][:4] == [4, 16, 16, 16]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("options", [{}, {"loss_fn": True}, {"measure": "grasp", "temperature": 2.0}], ids=str)
def test_new_tensors_have_the_precision_of_training(options, precision, tmp_path) -> None:
    """Noise that a step draws and tensors that a forward creates have the default type."""

    class Draws(SmallModule):
        def forward(self, x):
            return self.net(x + 0.1 * self.net[0](torch.randn(x.shape)).mean())

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(torch.randn(batch[0].shape)), batch[1], weight=torch.ones(4))

    if "loss_fn" in options:
        options = {"loss_fn": lambda module, batch: module.training_step(batch, 0)}
    callback = PruningCallback(**{"measure": "loss", "fraction": 0.5, "rounds": 2, "num_samples": 32, **options})
    monitor = GradientFlowMonitor(hessian=precision == "64-true")
    trainer(tmp_path, callbacks=[callback, monitor], precision=precision).fit(Draws(), shuffled(), shuffled())
    assert callback.finished
    assert callback.rows[0]["accuracy_after_cut"] >= 0


def test_an_error_in_evaluation_mode_explains_why_the_step_ran_there(tmp_path) -> None:
    class TwoOutputs(SmallModule):
        def forward(self, x):
            y = super().forward(x)
            return (y, y) if self.training else y

        def training_step(self, batch, batch_idx):
            first, second = self(batch[0])
            return F.cross_entropy(first, batch[1]) + F.cross_entropy(second, batch[1])

    with pytest.raises(ValueError, match="too many values to unpack") as error:
        train(tmp_path, TwoOutputs(), shuffled())
    assert "give the callback a `loss_fn(module, batch)`" in error.value.__notes__[0]

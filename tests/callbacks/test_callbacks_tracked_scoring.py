"""Tracked scores equal those of a plain training loop that averages by hand, in float64."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule, images, loader, trainer

from gflow_pl import PruningCallback
from gflow_pl.callbacks.tracked_scoring import StepGradients, TrackedScoring, is_tracked_batch
from gflow_pl.importance import TrackedBiasedLoss, Tracker

ALPHA, LR, CLIP = 0.7, 0.05, 0.05
PER_FILTER = {
    "loss": lambda w, g: (w * g).abs().flatten(1).sum(1),
    "biased_loss_tracked": lambda w, g: (w.abs() * (w * g).abs()).flatten(1).sum(1),
    "tfo": lambda w, g: (w * g).flatten(1).sum(1).abs(),
    "fisher": lambda w, g: (w * g).square().flatten(1).sum(1),
    "magnitude": lambda w, g: w.square().flatten(1).sum(1).sqrt(),
}


class Recorder(PruningCallback):
    """A callback that stores the scores of every round."""

    def select(self, graph, scores):
        self.__dict__.setdefault("seen", []).append({name: vector.clone() for name, vector in scores.items()})
        return super().select(graph, scores)


def weights_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.detach().clone()
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def gradients_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: net.get_submodule(name).weight.grad.clone() for name in weights_of(net)}


def by_hand(module, data, *, epochs, accumulate, clip, track_batches, order, formula, skip=0):
    """Return the average at the end of each epoch, computed with PyTorch alone."""
    net = module.net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    averages, norms = [], []
    for epoch in range(epochs):
        data.sampler.set_epoch(epoch)
        batches, scored = list(data)[skip:], []
        for first in range(0, len(batches), accumulate):
            for x, y in batches[first : first + accumulate]:
                (F.cross_entropy(net(x), y) / accumulate).backward()
            gradients, before = gradients_of(net), weights_of(net)
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), clip if clip else float("inf")).item())
            optimizer.step()
            optimizer.zero_grad()
            weights = before if order == "formula" else weights_of(net)
            scored.append({name: formula(weights[name], gradients[name]) for name in weights})
        average = {name: torch.zeros_like(vector) for name, vector in scored[0].items()}
        for scores in scored[-track_batches:]:
            average = {name: ALPHA * scores[name] + (1 - ALPHA) * average[name] for name in average}
        averages.append({f"net.{name}": vector for name, vector in average.items()})
    return averages, norms


@pytest.mark.parametrize("order", ["formula", "published"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, CLIP), (2, CLIP)])
@pytest.mark.parametrize("measure", PER_FILTER)
def test_tracked_scores_are_the_average_of_a_bare_loop(measure, accumulate, clip, order, tmp_path) -> None:
    pl.seed_everything(0)
    module, data = (
        SmallModule(lr=LR).double(),
        loader(images(80, torch.float64)),
    )  # five batches: the last step is short
    reference = copy.deepcopy(module)
    pruning = Recorder(
        measure, fraction=0.001, epochs=[1, 2], rounds=2, track=True, track_batches=2, alpha=ALPHA,
        track_order=order, keep_momentum=True, num_samples=16,
    )  # fmt: skip
    options = {"max_epochs": 3, "precision": "64-true", "accumulate_grad_batches": accumulate}
    run = trainer(tmp_path, callbacks=[pruning], gradient_clip_val=clip, enable_checkpointing=False, **options)
    run.fit(module, data)
    assert [row["filters_removed"] for row in pruning.rows] == [0, 0], "so that the bare loop trains the same network"

    settings = {"epochs": 2, "accumulate": accumulate, "clip": clip, "track_batches": 2, "order": order}
    expected, norms = by_hand(reference, data, formula=PER_FILTER[measure], **settings)
    assert min(norms) > 2 * CLIP, "clipping changes every step"
    compared = 0
    for ours, theirs in zip(pruning.seen, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, vector in theirs.items():
            assert ours[name].dtype == torch.float64
            assert (ours[name] - vector).abs().max() <= 1e-9 * vector.abs().max(), name
            compared += len(vector)
    assert compared == 2 * (8 + 8 + 8 + 12 + 4)


def test_the_two_orders_differ(tmp_path) -> None:
    """Weights before and after a step differ, so the scores differ."""
    seen = {}
    for order in ("formula", "published"):
        pl.seed_everything(0)
        pruning = Recorder("loss", fraction=0.5, track=True, track_order=order)
        run = trainer(tmp_path, callbacks=[pruning], max_epochs=2, enable_checkpointing=False)
        run.fit(SmallModule(), loader(images(32)))
        seen[order] = pruning.seen[0]
    assert all(not torch.equal(vector, seen["published"][name]) for name, vector in seen["formula"].items())


class FourfoldLoss(SmallModule):
    """A module whose gradients overflow in float32 at a scale of 2 ** 127."""

    def training_step(self, batch, batch_idx):
        return 4 * super().training_step(batch, batch_idx)


class ScalerOnly(MixedPrecision):
    """A gradient scaler without autocast, so that its steps can be compared."""

    def forward_context(self):
        return nullcontext()


@pytest.mark.parametrize("order", ["formula", "published"])
def test_gradients_are_unscaled_and_a_step_that_the_scaler_skips_is_not_tracked(order, tmp_path) -> None:
    pl.seed_everything(0)
    module, data = FourfoldLoss(lr=LR), loader(images(80))
    # The first step overflows in float32; from then on scaling is by a power of two, which is exact.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100, growth_interval=1000)
    pruning = Recorder("loss", fraction=0.5, track=True, alpha=ALPHA, track_order=order)
    plugin = ScalerOnly("16-mixed", device="cpu", scaler=scaler)
    options = {"plugins": [plugin], "max_epochs": 2, "gradient_clip_val": CLIP, "enable_checkpointing": False}
    reference = copy.deepcopy(module)
    trainer(tmp_path, callbacks=[pruning], **options).fit(module, data)
    assert scaler.get_scale() == 2.0**27

    with torch.no_grad():
        data.sampler.set_epoch(0)
        reference.net.train()(next(iter(data))[0])  # the skipped step has moved the running statistics and no weight
    settings = {"epochs": 1, "accumulate": 1, "clip": CLIP, "track_batches": 4, "order": order}
    expected, _ = by_hand(reference, data, skip=1, formula=PER_FILTER["loss"], **settings)
    for name, vector in expected[0].items():
        assert (pruning.seen[0][name] - 4 * vector).abs().max() <= 1e-4 * 4 * vector.abs().max(), name


@pytest.mark.parametrize("order", ["formula", "published"])
def test_gradients_that_a_fused_optimizer_unscales_in_its_step_are_tracked_unscaled(order, tmp_path) -> None:
    class Fused(SmallModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9, fused=True)

    seen = []
    for scale in (None, 2.0**16):
        pl.seed_everything(0)
        pruning = Recorder("loss", fraction=0.5, track=True, alpha=ALPHA, track_order=order)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        plugins = [] if scale is None else [ScalerOnly("16-mixed", device="cpu", scaler=scaler)]
        options = {"plugins": plugins, "max_epochs": 2, "enable_checkpointing": False}
        trainer(tmp_path, callbacks=[pruning], **options).fit(Fused(), loader(images(80)))
        seen.append(pruning.seen[0])
    for name, vector in seen[0].items():
        assert (seen[1][name] - vector).abs().max() <= 1e-4 * vector.abs().max(), name


def test_only_the_last_steps_of_the_epoch_are_tracked() -> None:
    def window(batches: float, accumulate: int, steps: int) -> list[int]:
        fake = SimpleNamespace(num_training_batches=batches, accumulate_grad_batches=accumulate)
        return [i for i in range(6) if is_tracked_batch(fake, i, steps)]

    assert window(6, 1, 2) == [4, 5]
    assert window(6, 2, 2) == [2, 3, 4, 5]
    assert window(5, 2, 2) == [2, 3, 4, 5], "the last step has one batch"
    assert window(6, 1, 20) == [0, 1, 2, 3, 4, 5]
    assert window(float("inf"), 1, 2) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("order", ["formula", "published"])
def test_the_steps_of_several_optimizers_are_all_tracked(order) -> None:
    torch.manual_seed(0)
    module = SmallModule(norm=True).double()
    x, y = images(16, torch.float64).tensors
    F.cross_entropy(module(x), y).backward()
    parts = {
        "first": [module.net[0].weight, module.net[3].conv1.weight],
        "norms": [module.net[1].weight],
        "rest": [module.net[3].conv2.weight, module.net[4].weight, module.net[9].weight],
    }
    steps = StepGradients(Tracker("loss", alpha=1.0), order)
    for parameters in parts.values():
        steps.before_step(module, torch.optim.SGD(parameters, lr=0.1), None)
    steps.after_step(module, None)
    scores = steps.tracker.scores()
    assert set(scores) == {"net.0", "net.3.conv1", "net.3.conv2", "net.4", "net.9"}
    for name, vector in scores.items():
        weight = module.get_submodule(name).weight
        assert torch.allclose(vector, (weight * weight.grad).abs().flatten(1).sum(1), rtol=1e-12)


def test_alpha_is_the_measures_own_unless_it_is_set() -> None:
    mine = TrackedBiasedLoss(alpha=0.3)
    assert PruningCallback(mine).alpha == 0.3
    callback = PruningCallback(mine, alpha=0.6, track=False)
    assert callback.alpha == callback.measure.alpha == 0.6
    assert mine.alpha == 0.3, "the caller's object stays as it is"
    assert PruningCallback("loss").alpha == 0.8


def test_an_average_continues_from_a_checkpoint(tmp_path) -> None:
    class Count(PruningCallback):
        updates = None

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                self.on_save_checkpoint(trainer, pl_module, saved := {})
                self.updates = saved["callbacks"][self.state_key]["tracker"]["num_updates"]
            super().on_train_epoch_start(trainer, pl_module)

    def fit(ckpt_path=None) -> int:
        pruning = Count("loss", fraction=0.5, epochs=[2], track=True)
        keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=8, filename="{step}", save_top_k=-1)
        run = trainer(tmp_path, callbacks=[pruning, keep], max_epochs=3)
        run.fit(SmallModule(), loader(images(80)), ckpt_path=ckpt_path, weights_only=True)
        return pruning.updates

    assert fit() == 5
    assert fit(tmp_path / "step=8.ckpt") == 5, "three before the checkpoint, two after it"


def test_a_skipped_batch_leaves_no_hooks_after_the_cut(tmp_path) -> None:
    """`on_train_batch_start` of a module may end the epoch, and then `on_train_batch_end` is not called."""
    num_hooks = []

    class Skips(SmallModule):
        def __init__(self):
            super().__init__()
            self.net[0] = weight_norm(self.net[0])

        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

        def on_train_epoch_start(self):
            num_hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.modules()))

    pruning = PruningCallback("loss", fraction=0.5, track=True, residual="remove")
    trainer(tmp_path, callbacks=[pruning], max_epochs=4, enable_checkpointing=False).fit(Skips(), loader(images(64)))
    assert pruning.finished
    assert num_hooks[1:] == [0, 0, 0]


def test_loading_a_checkpoint_ends_the_tracked_step_and_removes_its_hooks() -> None:
    module = SmallModule()
    module.net[0] = weight_norm(module.net[0])
    tracked, steps = TrackedScoring(), StepGradients(Tracker("loss"), "formula")
    steps.start_recording(module)
    parametrization = module.net[0].parametrizations.weight
    assert len(parametrization._forward_hooks) == 1
    tracked._steps = steps
    tracked.load_state_dict({"tracker": None, "epoch": 1})
    assert len(parametrization._forward_hooks) == 0
    assert tracked.state_dict() == {"tracker": None, "epoch": 1}


def test_a_temperature_that_has_no_effect_on_tracking_warns(tmp_path) -> None:
    pruning = PruningCallback("loss", fraction=0.5, track=True, temperature=5.0)
    with pytest.warns(UserWarning, match="the temperature 5 has no effect"):
        trainer(tmp_path, callbacks=[pruning], max_epochs=2).fit(SmallModule(), loader(images(32)))

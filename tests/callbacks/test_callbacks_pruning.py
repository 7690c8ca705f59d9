"""PruningCallback on a user's module, with real Trainers."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule, images, loader, trainer

import gflow_pl
from gflow_pl import PruningCallback
from gflow_pl.callbacks import find_pruning_callback, pruning_state_in
from gflow_pl.callbacks.lightning import silence
from gflow_pl.callbacks.lightning.silence import SideEffects
from gflow_pl.callbacks.lightning.unsupported import check_supported


def shuffled(number: int = 64) -> DataLoader:
    return DataLoader(images(number), batch_size=16, shuffle=True)


def callback(**options) -> PruningCallback:
    return PruningCallback(**{"measure": "loss", "fraction": 0.5, "rounds": 2, "num_samples": 32, **options})


def state_of(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def fit(folder, module=None, pruning=None, *, seed: int = 0, ckpt_path=None, data=None, val=None, **options):
    """Train a small module; return the module, its callback and the Trainer."""
    pl.seed_everything(seed)
    module = module or SmallModule(dropout=0.2)
    pruning = pruning or callback()
    callbacks = [pruning, *options.pop("callbacks", [])]
    run = trainer(folder, callbacks=callbacks, **options)
    run.fit(module, shuffled() if data is None else data, val, ckpt_path=ckpt_path, weights_only=True)
    return module, pruning, run


# Rounds


def test_rounds_are_cut_on_time_and_reach_the_fraction_exactly(tmp_path) -> None:
    module, pruning, run = fit(tmp_path, pruning=callback(rounds=3, warmup_epochs=1, keep_momentum=True), max_epochs=6)
    assert [row["epoch"] for row in pruning.rows] == [2, 3, 4]
    total = 8 + 8 + 8 + 12
    assert pruning.rows[-1]["filters_left"] == total - total // 2
    assert pruning.rows[-1]["parameters"] == sum(p.numel() for p in module.parameters())
    assert module.net[4].weight.shape[0] == module.net[4].out_channels == module.net[9].in_features
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
            for parameter in group["params"]:
                assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape


def test_protect_stem_keeps_the_stem_of_a_residual_stream_whole(tmp_path) -> None:
    module, _, _ = fit(tmp_path)
    assert module.net[0].out_channels == 8
    module, _, _ = fit(tmp_path, pruning=callback(protect_stem=False, measure="random", fraction=0.8))
    assert module.net[0].out_channels < 8


def test_a_cut_that_removes_nothing_changes_nothing(tmp_path) -> None:
    """Scoring, tracing and measuring do not change weights, statistics or random numbers."""
    one, pruning, _ = fit(tmp_path, pruning=callback(fraction=0.001, rounds=2, keep_momentum=True), val=shuffled(32))
    assert [row["filters_removed"] for row in pruning.rows] == [0, 0]
    pl.seed_everything(0)
    two = SmallModule(dropout=0.2)
    trainer(tmp_path).fit(two, shuffled(), shuffled(32))
    assert_equal(state_of(one), state_of(two))


def test_momentum_is_dropped_unless_it_is_kept(tmp_path) -> None:
    seen = {}

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen[trainer.current_epoch] = len(trainer.optimizers[0].state)

    fit(tmp_path, pruning=callback(keep_momentum=False), callbacks=[Look()])
    assert seen[1] == seen[2] == 0
    assert seen[3] > 0
    fit(tmp_path, pruning=callback(keep_momentum=True), callbacks=[Look()])
    assert seen[1] > 0
    assert seen[2] > 0


def test_a_subclass_may_override_when_and_what_to_prune(tmp_path) -> None:
    class Mine(PruningCallback):
        def should_prune(self, epoch):
            return epoch == 2 and self.rounds_done == 0

        def select(self, graph, scores):
            keep = {group.name: torch.ones(group.size, dtype=torch.bool) for group in graph.groups}
            keep["net.4"][:3] = False
            return gflow_pl.KeepPlan(keep)

    with pytest.warns(UserWarning, match="1 of 2 rounds"):
        module, pruning, _ = fit(tmp_path, pruning=Mine("magnitude", fraction=0.5, rounds=2))
    assert module.net[4].out_channels == 9
    assert [row["epoch"] for row in pruning.rows] == [2]


@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_a_schedule_that_does_not_fit_is_accepted_if_should_prune_is_overridden(how, tmp_path) -> None:
    class Mine(PruningCallback):
        def should_prune(self, epoch):
            return epoch in (1, 2)

    options = {"measure": "magnitude", "fraction": 0.5, "rounds": 2, "warmup_epochs": 20}
    pruning = Mine(**options) if how == "subclass" else PruningCallback(**options)
    if how == "instance":
        pruning.should_prune = lambda epoch: epoch in (1, 2)
    _, pruning, _ = fit(tmp_path, pruning=pruning)
    assert [row["epoch"] for row in pruning.rows] == [1, 2]


def test_should_prune_is_called_once_per_epoch_until_all_rounds_are_done(tmp_path) -> None:
    asked = []

    class Mine(PruningCallback):
        def should_prune(self, epoch):
            asked.append(epoch)
            return epoch in (0, 2, 4)

    _, pruning, _ = fit(tmp_path, pruning=Mine("magnitude", fraction=0.5, rounds=2), max_epochs=6)
    assert [row["epoch"] for row in pruning.rows] == [0, 2]
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("target", ["parameters", "macs"])
def test_a_target_in_parameters_or_multiply_accumulates_is_reached(target, tmp_path) -> None:
    _, pruning, _ = fit(tmp_path, pruning=callback(target=target, fraction=0.5, rounds=2))
    reached = pruning.rows[-1]["fraction_reached"]
    assert 0.4 < reached <= 0.5 + 1e-9


def test_cuts_at_given_epochs_may_begin_before_the_first_step(tmp_path) -> None:
    _, pruning, _ = fit(tmp_path, pruning=callback(epochs=[0, 2]))
    assert [row["epoch"] for row in pruning.rows] == [0, 2]


def test_a_round_takes_two_snapshots_of_the_module(tmp_path, monkeypatch) -> None:
    """One before the cut and one after it, for all measurements."""
    taken = []

    class Counted(SideEffects):
        def __init__(self, module):
            super().__init__(module)
            taken.append(module)

    monkeypatch.setattr(silence, "SideEffects", Counted)
    _, pruning, _ = fit(tmp_path, pruning=callback(measure="grasp", rounds=2), val=shuffled(16))
    assert all(isinstance(row["accuracy_after_cut"], float) for row in pruning.rows)
    assert len(taken) == 2 * 2 + 1, "of the trace as well"


# Resuming


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"measure": "magnitude", "keep_momentum": True, "prune_lr": 0.01},
        {"measure": "random"},
        {"measure": "loss", "bias": "distance_from_init", "keep_momentum": True},
        {"measure": "grasp"},
        {"measure": "biased_loss_tracked"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "loss",
)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(options, optimizer, tmp_path) -> None:
    def settings(**more):
        return {"pruning": callback(**options), "module": SmallModule(optimizer, dropout=0.2), "max_epochs": 5, **more}

    pl.seed_everything(0)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole, first, run = fit(tmp_path, callbacks=[keep], **settings())
    compared = 0
    for epoch in (0, 1, 2):
        file = tmp_path / f"epoch={epoch}.ckpt"
        pl.seed_everything(99)
        again, second, resumed = fit(tmp_path, seed=123, ckpt_path=file, **settings())
        assert_equal(state_of(whole), state_of(again))
        drop = {"seconds"}
        assert [{k: v for k, v in row.items() if k not in drop} for row in first.rows] == [
            {k: v for k, v in row.items() if k not in drop} for row in second.rows
        ]
        for a, b in zip(whole.parameters(), again.parameters(), strict=True):
            for key, value in run.optimizers[0].state[a].items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, resumed.optimizers[0].state[b][key])
                    compared += 1
    assert compared > 0


def test_a_schedule_that_contradicts_the_rounds_done_raises_and_a_changed_one_warns(tmp_path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, callbacks=[keep])
    file = tmp_path / "epoch=1.ckpt"
    with pytest.raises(ValueError, match="has done 1 rounds"):
        fit(tmp_path, pruning=callback(fraction=0.7), ckpt_path=file)
    with pytest.warns(UserWarning, match="the schedule has changed"):
        _, pruning, _ = fit(tmp_path, pruning=callback(measure="magnitude"), ckpt_path=file)
    assert [row["measure"] for row in pruning.rows] == ["loss", "magnitude"]


def test_random_states_of_another_number_of_processes_are_not_restored_with_a_warning(tmp_path) -> None:
    _, _, run = fit(tmp_path, max_epochs=3)
    run.save_checkpoint(tmp_path / "one.ckpt")
    contents = torch.load(tmp_path / "one.ckpt", weights_only=True)
    contents["callbacks"]["PruningCallback"]["rng"] *= 2
    torch.save(contents, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="written by 2 processes and is resumed by 1"):
        fit(tmp_path, ckpt_path=tmp_path / "two.ckpt")


def test_a_run_of_a_subclass_is_continued_by_another_class(tmp_path) -> None:
    """Lightning stores the states of callbacks under the names of their classes."""

    class Own(PruningCallback):
        pass

    pruning = Own("magnitude", fraction=0.5, rounds=2)
    with pytest.warns(UserWarning, match="after 1 of 2 rounds"):
        _, _, run = fit(tmp_path, pruning=pruning, max_steps=8)
    assert find_pruning_callback(run) is pruning
    run.save_checkpoint(tmp_path / "own.ckpt")
    state = pruning_state_in(torch.load(tmp_path / "own.ckpt", weights_only=True))
    assert state is not None
    assert state["rows"] == pruning.rows
    _, again, _ = fit(tmp_path, pruning=callback(measure="magnitude"), ckpt_path=tmp_path / "own.ckpt")
    assert [row["epoch"] for row in again.rows] == [1, 2]
    assert again.rows[0] == pruning.rows[0]


@pytest.mark.parametrize("name", ["OneCycleLR", "ReduceLROnPlateau", "CosineAnnealingWarmRestarts", "LambdaLR"])
def test_a_held_learning_rate_does_not_affect_schedulers_also_after_resuming(name, tmp_path) -> None:
    class Module(SmallModule):
        rates: list

        def configure_optimizers(self):
            self.rates = []
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            scheduler = {
                "OneCycleLR": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=24),
                "ReduceLROnPlateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
                "CosineAnnealingWarmRestarts": lambda: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
                    optimizer, 5
                ),
                "LambdaLR": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
            }[name]()
            interval = "step" if name == "OneCycleLR" else "epoch"
            settings = {"scheduler": scheduler, "interval": interval, "monitor": "rising"}
            return {"optimizer": optimizer, "lr_scheduler": settings}

        def on_train_batch_end(self, *_):
            group = self.trainer.optimizers[0].param_groups[0]
            self.rates.append((group["lr"], group["momentum"]))

        def on_train_epoch_end(self):
            self.log("rising", float(self.current_epoch))

    def settings(prune_lr):
        return {"pruning": callback(prune_lr=prune_lr, keep_momentum=True), "max_epochs": 6}

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    held, _, run = fit(tmp_path, Module(), callbacks=[keep], **settings(0.001))
    free, _, _ = fit(tmp_path, Module(), **settings(None))
    assert held.rates == free.rates
    assert len(set(held.rates)) > 3
    assert not torch.equal(held.net[0].weight, free.net[0].weight)
    # Lightning leaves the step that ReduceLROnPlateau takes after a checkpoint out when it resumes, with pruning or
    # without.
    for epoch in (0, 2) if name != "ReduceLROnPlateau" else ():  # while it is held, and afterwards
        again, _, resumed = fit(tmp_path, Module(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **settings(0.001))
        assert again.rates == held.rates[4 * (epoch + 1) :]
        assert_equal(state_of(held), state_of(again))
        assert (
            run.lr_scheduler_configs[0].scheduler.state_dict() == resumed.lr_scheduler_configs[0].scheduler.state_dict()
        )


# Checkpoints

RELOAD = """
import sys, torch
sys.path.insert(0, sys.argv[4])
from small_nets import SmallModule
import gflow_pl
module = gflow_pl.load_from_checkpoint(SmallModule, sys.argv[1]).eval()
torch.save(module(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
"""


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_file_loads_in_a_fresh_process(weights_only, tmp_path) -> None:
    module, _, run = fit(tmp_path)
    file, inputs, outputs = tmp_path / "file.ckpt", tmp_path / "in.pt", tmp_path / "out.pt"
    run.save_checkpoint(file, weights_only=weights_only)
    x = torch.randn(5, 3, 8, 8)
    torch.save(x, inputs)
    subprocess.run([sys.executable, "-c", RELOAD, file, inputs, outputs, str(Path(__file__).parent)], check=True)
    with torch.no_grad():
        assert torch.equal(module.eval()(x), torch.load(outputs, weights_only=True))


def test_the_best_checkpoint_is_never_of_the_unpruned_network(tmp_path) -> None:
    class Worse(SmallModule):
        """A module whose validation metric is best in the first epoch."""

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    best = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", monitor="val_loss")
    module, pruning, run = fit(tmp_path, Worse(), callbacks=[best], val=shuffled(16))
    assert Path(best.best_model_path).name == "epoch=2.ckpt"
    assert pruning.rows[-1]["epoch"] == 2
    run.test(module, shuffled(16), ckpt_path="best", verbose=False, weights_only=True)
    assert sum(p.numel() for p in module.parameters()) == pruning.rows[-1]["parameters"]


@pytest.mark.parametrize(("every_n_epochs", "is_pruned"), [(1, True), (2, False)])
@pytest.mark.parametrize("name", ["{epoch}", "same"])
def test_the_newest_file_is_not_best_if_it_is_from_before_the_last_cut(
    name, every_n_epochs, is_pruned, tmp_path
) -> None:
    """A ModelCheckpoint that monitors no metric may not save again between the cut and the end of training."""
    newest = ModelCheckpoint(tmp_path, name, every_n_epochs=every_n_epochs, enable_version_counter=False)
    module, pruning, run = fit(tmp_path, pruning=callback(epochs=[2], rounds=1), callbacks=[newest], max_epochs=3)
    (parameters,) = [row["parameters"] for row in pruning.rows]
    if is_pruned:
        run.test(module, shuffled(16), ckpt_path="best", verbose=False, weights_only=True)
        assert sum(p.numel() for p in module.parameters()) == parameters
    else:
        with pytest.raises(ValueError, match="not configured to save the best model"):
            run.test(module, shuffled(16), ckpt_path="best", verbose=False, weights_only=True)


def test_larger_and_smaller_checkpoints_than_the_current_network_can_be_tested(tmp_path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    module, _, _ = fit(tmp_path, callbacks=[keep])
    small = sum(p.numel() for p in module.parameters())
    run = trainer(tmp_path, callbacks=[callback()])
    run.test(module, shuffled(16), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False, weights_only=True)
    big = sum(p.numel() for p in module.parameters())
    assert big > small
    run.validate(module, shuffled(16), ckpt_path=tmp_path / "epoch=3.ckpt", verbose=False, weights_only=True)
    assert sum(p.numel() for p in module.parameters()) == small


def test_testing_a_checkpoint_does_not_change_the_rows_of_the_run(tmp_path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    module, pruning, run = fit(tmp_path, callbacks=[keep])
    rows, filters = copy.deepcopy(pruning.rows), pruning.num_filters
    for use in (run.test, run.validate):
        use(module, shuffled(16), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False, weights_only=True)
        assert pruning.rows == rows
        assert pruning.num_filters == filters
    run.test(module, shuffled(16), ckpt_path=tmp_path / "epoch=3.ckpt", verbose=False, weights_only=True)
    run.fit_loop.max_epochs = 5
    run.fit(module, shuffled())
    assert pruning.rows == rows


def test_training_continues_from_a_larger_checkpoint_that_was_loaded(tmp_path) -> None:
    """The tensors of a network that was loaded in `test` or `predict` are not inference tensors."""
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    module, _, run = fit(tmp_path, callbacks=[keep])
    small = sum(p.numel() for p in module.parameters())
    inputs = DataLoader(images(16).tensors[0], batch_size=8)
    outputs = run.predict(module, inputs, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert sum(p.numel() for p in module.parameters()) > small
    assert not any(t.is_inference() for t in (*module.parameters(), *module.buffers()))
    saved = gflow_pl.load_from_checkpoint(SmallModule, tmp_path / "epoch=0.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(torch.cat(outputs), torch.cat([saved(x) for x in inputs]))
    _, pruning, _ = fit(tmp_path, module)
    assert (
        sum(p.numel() for p in module.parameters()) == pruning.rows[-1]["parameters"] < saved.net[4].weight.numel() * 4
    )


def test_a_checkpoint_that_is_saved_on_an_exception_carries_the_shape(tmp_path) -> None:
    class Fails(SmallModule):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 2 and batch_idx == 1:
                raise RuntimeError("the network failed")
            return super().training_step(batch, batch_idx)

    module, pruning = Fails(), callback()
    with pytest.raises(RuntimeError, match="the network failed"):
        fit(tmp_path, module, pruning, callbacks=[OnExceptionCheckpoint(tmp_path, filename="failed")])
    again = gflow_pl.load_from_checkpoint(SmallModule, tmp_path / "failed.ckpt")
    assert sum(p.numel() for p in again.parameters()) == pruning.rows[-1]["parameters"]
    assert_equal(state_of(module), state_of(again))


def test_a_checkpoint_that_is_saved_on_an_exception_has_the_modules_own_learning_rate(tmp_path) -> None:
    """Lightning runs the training step within the step of the optimizer, where the rate is held."""

    class Fails(SmallModule):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 1:
                raise RuntimeError("the network failed")
            return super().training_step(batch, batch_idx)

    pruning = callback(prune_lr=0.001, evaluate_cuts=False, measure="magnitude", loss_fn=scalar_loss)
    with pytest.raises(RuntimeError, match="the network failed"):
        fit(tmp_path, Fails(), pruning, callbacks=[OnExceptionCheckpoint(tmp_path, filename="failed")])
    (saved,) = torch.load(tmp_path / "failed.ckpt", weights_only=True)["optimizer_states"]
    assert [group["lr"] for group in saved["param_groups"]] == [0.05]


def test_only_the_checkpoint_hooks_stay_on_the_module(tmp_path) -> None:
    before = set(vars(SmallModule()))
    module, _, run = fit(tmp_path, pruning=callback(prune_lr=0.01))
    left = {name for name in set(vars(module)) - before if not name.startswith("_")}
    assert left == {"on_save_checkpoint", "on_load_checkpoint"}
    assert not run.optimizers[0]._optimizer_step_pre_hooks
    again = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert_equal(state_of(module), state_of(again))


def test_the_unpruned_network_is_saved_just_before_the_first_cut(tmp_path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, pruning=callback(unpruned_path=str(tmp_path / "unpruned.ckpt")), callbacks=[keep])
    unpruned = torch.load(tmp_path / "unpruned.ckpt", weights_only=True)["state_dict"]
    assert_equal(unpruned, torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"])


# Other features of Lightning


@pytest.mark.parametrize("first", ["pruning", "average"])
def test_an_averaged_model_is_pruned_like_the_module(first, tmp_path) -> None:
    from pytorch_lightning.callbacks import EMAWeightAveraging

    pl.seed_everything(0)
    module, pruning, average = SmallModule(), callback(), EMAWeightAveraging(decay=0.9, update_every_n_steps=1)
    both = [pruning, average] if first == "pruning" else [average, pruning]
    run = trainer(tmp_path, callbacks=both)
    run.fit(module, shuffled())
    assert sum(p.numel() for p in module.parameters()) == pruning.rows[-1]["parameters"]
    run.save_checkpoint(tmp_path / "file.ckpt")
    again = gflow_pl.load_from_checkpoint(SmallModule, tmp_path / "file.ckpt")
    assert again.net[4].weight.shape == module.net[4].weight.shape


@pytest.mark.parametrize("first", ["pruning", "average"])
def test_a_run_with_an_averaged_model_is_resumed_to_the_bit(first, tmp_path) -> None:
    """Before, between and after the cuts, the averaged model takes the shape of the checkpoint as well."""
    from pytorch_lightning.callbacks import EMAWeightAveraging

    def train(seed, ckpt_path=None, **options):
        pl.seed_everything(seed)
        both = [callback(keep_momentum=True), EMAWeightAveraging(decay=0.9)]
        run = trainer(tmp_path, callbacks=[*(both if first == "pruning" else both[::-1]), *options.pop("more", [])])
        module = SmallModule(dropout=0.2)
        run.fit(module, shuffled(), ckpt_path=ckpt_path, weights_only=True)
        return state_of(module)

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole = train(0, more=[keep])
    for epoch in (0, 1, 2):
        assert_equal(whole, train(99, tmp_path / f"epoch={epoch}.ckpt"))


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"precision": "16-mixed"}, {"gradient_clip_val": 0.5}]
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_precision_clipping_and_accumulation(options, accumulate, tmp_path) -> None:
    pruning = callback(keep_momentum=True)
    _, pruning, _ = fit(tmp_path, SmallModule("AdamW"), pruning, accumulate_grad_batches=accumulate, **options)
    assert pruning.finished


@pytest.mark.parametrize("residual", ["expand", "remove"])
def test_a_channels_last_network_keeps_its_memory_format_and_is_pruned_like_any_other(residual, tmp_path) -> None:
    same = SmallModule()
    start = state_of(same)

    class Last(SmallModule):
        def __init__(self):
            super().__init__()
            self.load_state_dict(start)
            self.to(memory_format=torch.channels_last)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0].to(memory_format=torch.channels_last), batch[1]

    data = DataLoader(images(64, torch.float64), batch_size=16)
    options = {"residual": residual, "protect_stem": False, "keep_momentum": True, "measure": "biased_loss"}
    last, one, run = fit(tmp_path, Last(), callback(**options), data=data, precision="64-true")
    plain, two, _ = fit(tmp_path, same, callback(**options), data=data, precision="64-true")
    assert [row["removed_by_layer"] for row in one.rows] == [row["removed_by_layer"] for row in two.rows]
    convs = [p for p in last.parameters() if p.ndim == 4 and p.shape[2:] == (3, 3)]
    assert len(convs) == 4
    for parameter in convs:
        for tensor in (parameter, run.optimizers[0].state[parameter]["momentum_buffer"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert not tensor.is_contiguous()
    for a, b in zip(last.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 1},
        {"limit_train_batches": 0.5, "limit_val_batches": 1},
        {"check_val_every_n_epoch": 2},
        {"limit_val_batches": 0},
        {"max_time": "00:01:00:00"},
        {"max_epochs": -1, "max_steps": 15},
        {"val_check_interval": 0.5},
    ],
    ids=str,
)
def test_limits_of_the_trainer(options, tmp_path) -> None:
    _, pruning, _ = fit(tmp_path, val=shuffled(16), **options)
    assert pruning.finished


def test_fast_dev_run(tmp_path) -> None:
    fit(tmp_path, fast_dev_run=True)
    _, pruning, _ = fit(tmp_path, pruning=callback(epochs=[0, 1]), fast_dev_run=True)
    assert pruning.rounds_done == 1


def test_a_repeated_fit_on_one_trainer_continues(tmp_path) -> None:
    module, pruning, run = fit(tmp_path, pruning=callback(rounds=2, epochs=[1, 3]), max_epochs=4)
    run.fit_loop.max_epochs = 6
    run.fit(module, shuffled())
    assert [row["epoch"] for row in pruning.rows] == [1, 3]
    assert run.current_epoch == 6


def test_rounds_that_early_stopping_prevents_are_reported_by_a_warning(tmp_path) -> None:
    class Flat(SmallModule):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

    stop = EarlyStopping("val_loss", patience=1)
    with pytest.warns(UserWarning, match=r"after 1 of 3 rounds; the others were due at epochs \[5, 6\]"):
        fit(tmp_path, Flat(), callback(rounds=3, epochs=[1, 5, 6]), callbacks=[stop], val=shuffled(16), max_epochs=8)


@pytest.mark.parametrize("reset", [True, False])
def test_reset_best_resets_early_stopping_at_each_round(reset, tmp_path) -> None:
    """The score of a pruned network must not be compared with the best score of the unpruned one."""

    class Worse(SmallModule):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", [1.0, 3.0, 5.0, 4.0, 3.0, 2.0][self.current_epoch])

    pruning = callback(epochs=[1, 2], reset_best=reset)
    _, pruning, run = fit(
        tmp_path,
        Worse(),
        pruning,
        callbacks=[EarlyStopping("val_loss", patience=2)],
        val=shuffled(16),
        max_epochs=6,
    )
    assert pruning.finished
    assert run.current_epoch == (6 if reset else 3)


@pytest.mark.parametrize("collection", ["dict", "list"])
def test_collections_of_loaders(collection, tmp_path) -> None:
    class Two(SmallModule):
        def training_step(self, batch, batch_idx):
            parts = batch.values() if isinstance(batch, dict) else batch
            return sum(super(Two, self).training_step(part, batch_idx) for part in parts)

        @property
        def example_input_array(self):
            return torch.zeros(2, 3, 8, 8)

        @example_input_array.setter
        def example_input_array(self, value):
            pass

    loaders = {"a": shuffled(), "b": shuffled(32)} if collection == "dict" else [shuffled(), shuffled(32)]
    _, pruning, _ = fit(tmp_path, Two(), data=loaders)
    assert pruning.finished


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for x, y in images(48)])


def test_data_without_a_length_needs_batches(tmp_path) -> None:
    data = DataLoader(Stream(), batch_size=16)
    with pytest.raises(ValueError, match="set `batches` to the number"):
        fit(tmp_path, data=data)
    _, pruning, _ = fit(tmp_path, pruning=callback(batches=2), data=data)
    assert pruning.finished


def test_the_trials_of_a_learning_rate_finder_have_no_rounds(tmp_path) -> None:
    finder = LearningRateFinder(num_training_steps=5)
    module = SmallModule()
    _, pruning, _ = fit(tmp_path, module, callback(epochs=[0, 2]), callbacks=[finder])
    assert [row["epoch"] for row in pruning.rows] == [0, 2]


def test_the_trials_of_a_batch_size_finder_have_no_rounds(tmp_path) -> None:
    class Data(pl.LightningDataModule):
        batch_size = 4

        def train_dataloader(self):
            return DataLoader(images(64), batch_size=self.batch_size, shuffle=True)

        def val_dataloader(self):
            return DataLoader(images(16), batch_size=self.batch_size)

    pruning = callback(epochs=[0, 2])
    run = trainer(tmp_path, callbacks=[pruning, BatchSizeFinder(max_trials=2, steps_per_trial=1)])
    run.fit(SmallModule(), datamodule=Data())
    assert [row["epoch"] for row in pruning.rows] == [0, 2]


def test_nine_rounds_of_a_compiled_network(tmp_path) -> None:
    compiled = CompileCounter()

    class Compiled(SmallModule):
        def __init__(self):
            super().__init__()
            self.net.compile(backend=compiled)

    _, pruning, _ = fit(tmp_path, Compiled(), callback(rounds=9, fraction=0.6, evaluate_cuts=False), max_epochs=11)
    assert pruning.rounds_done == 9
    assert compiled.frame_count >= 10, "dynamo must not have given up compiling"


def test_a_compiled_module_is_pruned(tmp_path) -> None:
    """`Trainer.fit(torch.compile(module))`."""
    compiled = CompileCounter()
    pl.seed_everything(0)
    module, pruning = SmallModule(), callback(evaluate_cuts=False)
    trainer(tmp_path, callbacks=[pruning]).fit(torch.compile(module, backend=compiled), shuffled())
    assert pruning.finished
    assert compiled.frame_count >= 3, "once before the rounds and once after each"


# Errors


def scalar_loss(module, batch):
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])


def refused(tmp_path, *, module=None, **options) -> str:
    with pytest.raises((MisconfigurationException, ValueError)) as error:
        fit(tmp_path, module, **options)
    return str(error.value)


def test_unsupported_configurations_raise_an_error_with_a_remedy(tmp_path) -> None:
    assert "WeightAveraging" in refused(tmp_path, callbacks=[StochasticWeightAveraging(0.1)])
    assert "two of these callbacks in the Trainer: keep one" in refused(tmp_path, callbacks=[callback()])
    for strategy in ("ddp_spawn", "ddp_fork"):
        # Our own modules as well: the main process loads the workers' weights past every hook of ours.
        with pytest.raises(MisconfigurationException, match="use strategy='ddp'"):
            check_supported(trainer(tmp_path, strategy=strategy, devices=2), callback(), PruningCallback)
    assert "set max_epochs to at least 6" in refused(tmp_path, pruning=callback(rounds=5))

    class Manual(SmallModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    assert "loss_fn(module, batch)" in refused(tmp_path, module=Manual())

    class Fetches(SmallModule):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return scalar_loss(self, batch)

    assert "fetches its batches itself" in refused(tmp_path, module=Fetches())
    _, pruning, _ = fit(tmp_path, Fetches(), callback(loss_fn=scalar_loss))
    assert pruning.finished

    class Flat(SmallModule):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)

        def on_train_start(self):
            assert not self.trainer.callbacks[0].keep_momentum, "must be refused before"

    assert "set keep_momentum to false" in refused(tmp_path, module=Flat(), pruning=callback(keep_momentum=True))
    _, pruning, _ = fit(tmp_path, Flat())
    assert pruning.finished


@pytest.mark.parametrize(
    "strategy",
    # Lightning's own constructor of the second asks for deepspeed to be installed.
    [
        pl.strategies.FSDPStrategy,
        type("DeepSpeed", (pl.strategies.DeepSpeedStrategy,), {"__init__": pl.strategies.DDPStrategy.__init__}),
    ],
)
def test_strategies_that_shard_parameters_raise(strategy, tmp_path) -> None:
    run = trainer(tmp_path)
    run._accelerator_connector.strategy = strategy()
    message = f"{strategy.__name__} shards parameters.*use strategy='ddp'"
    with pytest.raises(MisconfigurationException, match=message):
        check_supported(run, callback(), PruningCallback)


@pytest.mark.filterwarnings("ignore:PruningCallback. training ended in epoch")
@pytest.mark.parametrize("max_steps", [6, -1], ids=["between rounds", "finished"])
def test_a_callback_cannot_be_used_again_for_another_network(max_steps, tmp_path) -> None:
    pruning = callback()
    fit(tmp_path, pruning=pruning, max_steps=max_steps)
    assert "make a new PruningCallback for every network" in refused(tmp_path, pruning=pruning)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 75}, "for 75 % write 0.75"),
        ({"fraction": 0.0}, "(0, 1)"),
        ({"rounds": 0}, "`rounds`"),
        ({"rounds": None, "fraction": None, "thresholds": [0.5, 0.1]}, "must ascend"),
        ({"thresholds": [0.5]}, "either"),
        ({"measure": "los"}, "Did you mean 'loss'?"),
        ({"target": "flops"}, "filters, parameters, macs"),
        ({"residual": "keep"}, "expand, remove"),
        ({"bias": "big"}, "distance_from_init"),
        ({"num_samples": 0}, "`num_samples`"),
        ({"batches": 0}, "`batches`"),
        ({"min_kept": 2.0}, "`min_kept`"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"prune_lr": -0.1}, "`prune_lr`"),
        ({"warmup_epochs": -1}, "`warmup_epochs`"),
        ({"seed": -1}, "`seed`"),
        ({"seed": True}, "`seed`"),
        ({"track_batches": 0}, "`track_batches`"),
        ({"alpha": 0.0}, "`alpha` must be in (0, 1]"),
        ({"min_kept": "half"}, "`min_kept`"),
        ({"epochs": 3}, "`epochs` must be a list of epochs"),
        ({"epochs": [1, 2.5]}, "`epochs` must be whole numbers"),
        ({"every_n_epochs": 1.5}, "`every_n_epochs`"),
        ({"ignore": "net.4"}, "`ignore` must be a list of names"),
        ({"ignore": [4]}, "`ignore` must be a list of names"),
        ({"keep_momentum": "False"}, "`keep_momentum` must be true or false, got 'False'"),
        ({"track": 1}, "`track` must be true or false"),
        ({"exact_only": None}, "`exact_only` must be true or false"),
        ({"protect_stem": "no"}, "`protect_stem`"),
        ({"published_truncation": 0}, "`published_truncation`"),
        ({"reset_best": "yes"}, "`reset_best`"),
        ({"evaluate_cuts": []}, "`evaluate_cuts`"),
        ({"scope": "all"}, "global, layer"),
        ({"unit_score": "median"}, "mean, sum, max"),
        ({"track_order": "after"}, "formula, published"),
        ({"loss_fn": "mse"}, "`loss_fn` must be a function"),
        ({"logits_fn": 3}, "`logits_fn` must be a function"),
        ({"unpruned_path": 7}, "`unpruned_path`"),
        ({"rows_path": True}, "`rows_path`"),
        ({"measure": 3}, "measure"),
    ],
)
def test_every_argument_is_checked_at_construction(options, message) -> None:
    with pytest.raises(ValueError) as error:
        callback(**options)
    assert message in str(error.value)


def test_a_module_without_logits_is_scored_by_its_own_loss_with_one_message(tmp_path, caplog) -> None:
    class Autoencoder(SmallModule):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]).sum(1) - batch[0].mean(dim=(1, 2, 3))).square().mean()

    class Data(torch.utils.data.TensorDataset):
        def __getitem__(self, index):
            return (self.tensors[0][index],)

    data = DataLoader(Data(images(32).tensors[0]), batch_size=16, shuffle=True)
    with caplog.at_level("INFO"):
        _, pruning, _ = fit(tmp_path, Autoencoder(), callback(measure="grasp"), data=data)
    assert pruning.finished
    assert len([r for r in caplog.records if "scored by the module's loss as it is" in r.getMessage()]) == 1


def test_the_data_order_of_small_nets_is_shared() -> None:
    """A condition of the tests with two processes: the batches of two ranks are together those of one process."""
    whole = list(loader(images(32), 16))
    halves = [list(loader(images(32), 8, rank=rank, world_size=2)) for rank in (0, 1)]
    for k, (x, _) in enumerate(whole):
        both = torch.cat([halves[0][k][0], halves[1][k][0]])
        assert sorted(map(float, both.sum((1, 2, 3)))) == pytest.approx(sorted(map(float, x.sum((1, 2, 3)))))

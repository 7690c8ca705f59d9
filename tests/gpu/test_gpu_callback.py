"""Whole runs on the GPU: mixed precision, fused optimizers, resuming, one rank over NCCL, compilation, commands."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from gpu_device import ACCELERATOR, DEVICE, ON_CUDA, distance, inductor, on_device
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from real_images import real_images, write_image_folder
from small_nets import SmallModule, images, loader, trainer
from test_gpu_importance import Guard
from torch.utils.data import DataLoader, TensorDataset

from gflow_pl import GradientFlowMonitor, ImageClassifier, PruningCallback
from gflow_pl.callbacks import scoring
from gflow_pl.importance import measure_names, resolve_measure
from gflow_pl.surgery import apply_structure

ROOT = Path(__file__).parent.parent.parent
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-4, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.002, fused=True),
}


class Fused(ImageClassifier):
    """The task of the paper with a fused optimizer."""

    def __init__(self, optimizer="SGD", network="resnet56"):
        super().__init__(network, num_classes=10, temperature=1.0)
        self.save_hyperparameters("optimizer")

    def configure_optimizers(self):
        return OPTIMIZERS[self.hparams.optimizer](self.parameters())


def real_batches(split="train", batch_size=10, repeats=1):
    """The bundled real images; shuffled for training."""
    pixels, labels = real_images(split)
    x = torch.from_numpy(np.concatenate([pixels] * repeats)).permute(0, 3, 1, 2).float() / 127.5 - 1
    y = torch.from_numpy(np.concatenate([labels] * repeats))
    return DataLoader(TensorDataset(x, y), batch_size, shuffle=split == "train", pin_memory=ON_CUDA)


def mixed(options):
    """16-mixed with a scale from which no step overflows; on the CPU, where Lightning refuses it, too.

    The usual 65536 is too much for the first step, and torch goes on from a first step of a fused SGD that is skipped
    with momentum that it never wrote.
    """
    if options.get("precision") != "16-mixed":
        return {}
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    return {"precision": None, "plugins": [MixedPrecision("16-mixed", DEVICE.type, scaler)]}


class Devices(Callback):
    """Notes where everything lies while it trains; in the end Lightning moves it all to the CPU."""

    def __init__(self):
        self.seen = set()

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen |= {tensor.device for tensor in (*pl_module.parameters(), *pl_module.buffers())}
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():
                self.seen |= {v.device for v in state.values() if isinstance(v, torch.Tensor)}


def run(folder, module, pruning, *more, ckpt_path=None, **options):
    """Trains on the device; validated at every epoch."""
    settings = {"accelerator": ACCELERATOR, "max_epochs": 5, "benchmark": False, **options, **mixed(options)}
    devices = Devices()
    lightning = trainer(folder, callbacks=[pruning, devices, *more], **settings)
    lightning.fit(module, real_batches(), real_batches("test"), ckpt_path=ckpt_path, weights_only=True)
    assert devices.seen == {DEVICE}
    return lightning


def rows_of(pruning):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in pruning.rows]


def assert_pruned(module, lightning, pruning, rounds=3):
    """All rounds were cut, and everything has its new shape."""
    assert pruning.finished
    assert len(pruning.rows) == rounds
    left = [row["filters_left"] for row in pruning.rows]
    assert left == sorted(left, reverse=True)
    assert len(set(left)) == rounds, left
    for row in pruning.rows:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert all(np.isfinite(numbers)), row
    assert lightning.strategy.root_device == DEVICE
    for optimizer in lightning.strategy.optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} <= {id(p) for p in module.parameters()}
        for p in held:
            assert p.isfinite().all()
            for key, value in optimizer.state[p].items():
                assert not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == p.shape, key


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("measure", ["loss", "grad_preserve"])
def test_a_whole_run(measure, precision, optimizer, tmp_path):
    pl.seed_everything(0)
    module = Fused(optimizer)
    pruning = PruningCallback(measure, fraction=0.6, rounds=3, num_samples=20, keep_momentum=True)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    lightning = run(tmp_path, module, pruning, keep, GradientFlowMonitor(), precision=precision)
    assert_pruned(module, lightning, pruning)
    assert (lightning.precision_plugin.scaler is not None) == (precision == "16-mixed")

    again = Fused.load_from_checkpoint(tmp_path / "epoch=4.ckpt", map_location="cpu", weights_only=True)
    assert {p.device.type for p in (*again.parameters(), *again.buffers())} == {"cpu"}
    x = next(iter(real_batches("test")))[0]
    with torch.no_grad():
        ours = module.to(DEVICE).eval()(x.to(DEVICE))
        theirs = again.eval()(x)
        assert distance(ours, theirs) < 1e-2, "in float32"
        ours, theirs = module.double()(x.double().to(DEVICE)), again.double()(x.double())
    assert distance(ours, theirs) < 1e-9, "in float64"


@pytest.mark.parametrize("residual", ["expand", "remove"])
def test_a_run_with_deterministic_kernels_only(residual, tmp_path):
    """Nothing that the library adds to a network lacks a deterministic kernel."""
    pl.seed_everything(0)
    pruning = PruningCallback("biased_loss_tracked", fraction=0.6, rounds=3, num_samples=20, residual=residual)
    module = Fused()
    lightning = run(tmp_path, module, pruning, deterministic=True, precision="bf16-mixed")
    assert_pruned(module, lightning, pruning)


def state_of(module, lightning, pruning):
    """All that two runs can be compared by."""
    (optimizer,) = lightning.strategy.optimizers
    state = {f"module/{name}": value.cpu().clone() for name, value in module.state_dict().items()}
    for name, p in module.named_parameters():
        for key, value in optimizer.state[p].items():
            state[f"optimizer/{name}/{key}"] = torch.as_tensor(value).cpu().clone()
    scaler = lightning.precision_plugin.state_dict()
    return {"tensors": state, "scaler": scaler, "rows": rows_of(pruning), "group": optimizer.param_groups[0]["lr"]}


def differences(one, two):
    """What differs, in words."""
    found = [key for key in ("scaler", "rows", "group") if one[key] != two[key]]
    a, b = one["tensors"], two["tensors"]
    if a.keys() != b.keys():
        return [*found, f"names: {sorted(set(a) ^ set(b))[:5]}"]
    shapes = [f"{name}: {tuple(a[name].shape)}, {tuple(b[name].shape)}" for name in a if a[name].shape != b[name].shape]
    if shapes:
        return [*found, *shapes[:5]]
    values = {name: distance(a[name], b[name]) for name in a if not torch.equal(a[name], b[name])}
    worst = sorted(values, key=values.get)[-3:]
    return found + [f"{len(values)} of {len(a)} tensors; {name}: {values[name]:.1e} of its largest" for name in worst]


@pytest.mark.parametrize("track", [False, True], ids=["passes", "tracked"])
@pytest.mark.parametrize(
    ("precision", "optimizer"), [("16-mixed", "SGD"), ("16-mixed", "AdamW"), ("bf16-mixed", "SGD")]
)
def test_a_run_resumed_at_an_epochs_end_equals_the_uninterrupted_one(precision, optimizer, track, tmp_path):
    def fit(seed, ckpt_path=None, more=()):
        pl.seed_everything(seed)
        module = Fused(optimizer)
        pruning = PruningCallback("loss", fraction=0.6, rounds=3, num_samples=20, keep_momentum=True, track=track)
        lightning = run(
            tmp_path, module, pruning, *more, ckpt_path=ckpt_path, precision=precision, deterministic="warn"
        )
        assert_pruned(module, lightning, pruning)
        return state_of(module, lightning, pruning)

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(0, more=[keep])
    repeated = differences(whole, fit(0))
    resumed = differences(whole, fit(99, tmp_path / "epoch=1.ckpt"))
    if not repeated:
        assert not resumed, f"a run repeats to the last bit here, but a resumed one differs: {resumed}"
        return
    # Without equal bits in two runs of one kind, only what is near can be asked of two of different kinds.
    warnings.warn(f"two equal runs differ on this device, so resuming is compared loosely: {repeated}", stacklevel=1)
    assert not [text for text in resumed if text.startswith(("names", "rows")) or ": (" in text], resumed


@pytest.mark.parametrize("measure", [name for name in measure_names() if resolve_measure(name).needs_gradients])
@pytest.mark.parametrize("precision", ["16-mixed", "32-true"])
def test_scores_of_a_round_never_wait_for_the_device(precision, measure, tmp_path, monkeypatch):
    """From the first batch of each round to the finished scores; the plan, made of these, is what comes to the host."""
    guards = []

    def guarded(module, measure, batches, **options):
        guards.append(Guard(monkeypatch))
        return scored(module, measure, guards[-1].batches(batches), **options)

    scored = scoring.score_filters
    monkeypatch.setattr(scoring, "score_filters", guarded)
    pl.seed_everything(0)
    module = Fused()
    pruning = PruningCallback(measure, fraction=0.5, rounds=2, num_samples=20, track=False, evaluate_cuts=False)
    run(tmp_path, module, pruning, precision=precision, max_epochs=3, limit_train_batches=2, limit_val_batches=1)
    assert pruning.finished
    assert [guard.events for guard in guards] == [[True, False]] * 2
    assert on_device(module.to(DEVICE))


class Recorder(PruningCallback):
    """A callback that stores the scores of every round on the host."""

    def select(self, graph, scores):
        self.__dict__.setdefault("seen", []).append({name: vector.cpu().clone() for name, vector in scores.items()})
        return super().select(graph, scores)


class Still(SmallModule):
    """A module whose steps are so small that its weights hardly change."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9, momentum=0.9, fused=self.fused)


@pytest.mark.parametrize("order", ["formula", "published"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("measure", ["loss", "fisher"])
def test_tracked_scores_are_of_unscaled_gradients(measure, fused, order, tmp_path):
    """A gradient that still carries the scale 65536 would differ far more than half precision does."""
    seen = {}
    for precision in ("32-true", "16-mixed", "bf16-mixed"):
        pl.seed_everything(0)
        pruning = Recorder(measure, fraction=0.3, rounds=1, epochs=[1], track=True, track_order=order, num_samples=16)
        options = {"accelerator": ACCELERATOR, "precision": precision, "max_epochs": 2, "enable_checkpointing": False}
        lightning = trainer(tmp_path, callbacks=[pruning], **{**options, **mixed(options)})
        lightning.fit(Still(fused), loader(images(80)))
        seen[precision] = pruning.seen[0]
        if precision == "16-mixed":
            assert lightning.precision_plugin.scaler.get_scale() > 100
    for precision in ("16-mixed", "bf16-mixed"):
        for layer, vector in seen["32-true"].items():
            apart = distance(seen[precision][layer], vector)
            assert apart < (0.1 if precision == "16-mixed" else 0.5), (precision, layer, apart)


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_a_compiled_module_is_pruned_twice(backend, tmp_path):
    pl.seed_everything(0)
    module = SmallModule()
    pruning = PruningCallback("loss", fraction=0.5, rounds=2, num_samples=32)
    lightning = trainer(tmp_path, callbacks=[pruning], accelerator=ACCELERATOR, max_epochs=4, precision="bf16-mixed")
    lightning.fit(torch.compile(module, backend=backend), loader(images(64)))
    assert pruning.rounds_done == 2
    again = SmallModule()
    saved = torch.load(lightning.checkpoint_callback.best_model_path, weights_only=True, map_location="cpu")
    apply_structure(again, saved["gflow_pl"]["structure"])
    again.load_state_dict(saved["state_dict"])
    x = images(8).tensors[0]
    with torch.no_grad():
        ours = module.to(DEVICE).eval()(x.to(DEVICE))
        assert distance(ours, again.eval()(x)) < 1e-3


# In processes of their own


def finished(line, folder):
    """Run a command, and return its output; fail with the output if the command fails."""
    folders = [ROOT, ROOT / "tests", ROOT / "tests" / "gpu", ROOT / "tests" / "callbacks"]
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, cwd=folder, check=False, env=environment)
    assert done.returncode == 0, f"{' '.join(map(str, line))}\n{(done.stderr + done.stdout)[-4000:]}"
    return done.stdout + done.stderr


def one_rank(folder, *arguments):
    finished([sys.executable, str(Path(__file__).parent / "one_rank.py"), str(folder), *arguments], folder)
    return json.loads((folder / "result.json").read_text())


def test_synchronised_norms_are_trained_before_and_after_a_rewrite(tmp_path):
    output = one_rank(tmp_path, "surgery")
    assert output["backend"] == ("nccl" if ON_CUDA else "gloo")
    assert output["synchronised"] == 3
    assert output["apart"] < 1e-5, "the rewritten network computes what the masked one would"
    assert output["moved"] > 0
    assert output["finite"]
    assert output["after conversion"] < 1e-6, "apply_structure after the conversion brings the expansions back"


@pytest.mark.parametrize("sync", ["plain", "sync_batchnorm"])
def test_one_rank_prunes_and_resumes(sync, tmp_path):
    output = one_rank(tmp_path, "train", sync)
    assert output["backend"] == ("nccl" if ON_CUDA else "gloo")
    assert output["rounds"] == 3
    assert output["resumed"] == [], "the resumed run differs from the uninterrupted one"
    assert (output["synchronised"] > 0) == (sync == "sync_batchnorm")
    assert output["loads on the cpu"] < 1e-3


def gflow(folder, *arguments):
    return finished([sys.executable, "-m", "gflow_pl", *arguments], folder)


@pytest.mark.parametrize(("precision", "data"), [("16-mixed", "Digits"), ("bf16-mixed", "ImageFolder")])
def test_the_commands(precision, data, tmp_path):
    options = ["--data", data, "--data.batch_size", "16", "--data.num_workers", "0"]
    if data == "ImageFolder":
        options += ["--data.root", str(write_image_folder(tmp_path / "images"))]
    device = ["--trainer.accelerator", ACCELERATOR]
    short = ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2"]
    pruning = ["--pruning.fraction", "0.6", "--pruning.rounds", "3", "--pruning.num_samples", "48"]
    pruning += ["--pruning.measure", "loss", "--trainer.max_epochs", "5", "--trainer.precision", precision]
    output = gflow(
        tmp_path, "prune", "--model.network", "resnet56", "--name", "pruned", *options, *device, *short, *pruning
    )
    assert "filters" in output
    folder = tmp_path / "checkpoints" / "pruned"
    assert len((folder / "pruning.csv").read_text().splitlines()) == 1 + 3
    file = ["--ckpt_path", str(folder / "last.ckpt")]
    gflow(tmp_path, "test", *file, "--name", "tested", *options, *device)
    report = json.loads((tmp_path / "checkpoints" / "tested" / "report.json").read_text())
    assert report["networks"], report
    assert torch.load(folder / "last.ckpt", weights_only=True, map_location="cpu")["gflow_pl"]["structure"]

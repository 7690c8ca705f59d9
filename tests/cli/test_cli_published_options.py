"""Every option of the published scripts has a setting here that takes effect, and the README names it."""

import copy
import json
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from real_images import real_images, write_cifar10, write_image_folder
from torchvision import datasets

sys.path.insert(0, str(Path(__file__).parent.parent / "callbacks"))
from small_nets import SmallModule, images, loader, trainer

import gflow_pl
from gflow_pl import GradientFlowMonitor, PruningCallback
from gflow_pl.__main__ import main
from gflow_pl.cli.app import GflowCLI
from gflow_pl.data import CIFAR10, CIFAR100, ImageFolder
from gflow_pl.files import read_rows
from gflow_pl.models import build
from gflow_pl.surgery import add_structure

README = Path(__file__).parent.parent.parent / "README.md"
QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_model_summary", "false"]
VGG = ["--model.network", "vgg13"]

MAIN = {
    *("model", "seed", "pretrained_path", "data_path", "download", "pruning_type", "prune_percent", "n_rounds", "T"),
    *("grasp_T", "imp_samples", "track_stats", "num_classes", "moment", "warmup_epochs", "thresholds", "lr_prune"),
    *("preserve_moment", "track_importance", "track_batches", "alpha", "use_init", "use_l2", "bypass"),
}
TRAIN = {"model", "seed", "data_path", "num_classes", "T", "download", "track_stats"}
EVAL = {"model", "pruned", "model_path", "data_path", "train_acc", "test_acc", "flops", "compression", "download"}
EVAL |= {"num_classes"}


# From settings to objects, and what these then do


class Parsed(GflowCLI):
    """A command that stops when all its objects are made."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""

    @property
    def pruning(self) -> PruningCallback:
        return next(c for c in self.trainer.callbacks if isinstance(c, PruningCallback))


def parsed(command: str, *settings: str) -> Parsed:
    return Parsed([command, *QUIET, *settings])


def pruned(*settings: str, max_epochs: int = 3) -> SimpleNamespace:
    """Prune a small network with the callback that the settings make; what it scored and did."""
    pruning = parsed("prune", *VGG, "--pruning.num_samples", "32", "--pruning.fraction", "0.5", *settings).pruning
    pruning.unpruned_path = None
    seen = SimpleNamespace(pruning=pruning, scores=[], states=[], weights=[])
    select = pruning.select

    def watched(graph, scores):
        seen.scores.append({name: value.clone() for name, value in scores.items()})
        return select(graph, scores)

    pruning.select = watched

    class Before(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.weights.append(copy.deepcopy(pl_module.state_dict()))

    class After(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.states.append(len(trainer.optimizers[0].state))

    pl.seed_everything(0)
    module = SmallModule()
    run = trainer(Path(), max_epochs=max_epochs, callbacks=[Before(), pruning, After()], enable_checkpointing=False)
    run.fit(module, loader(images(64)))
    assert seen.scores
    return seen


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GFLOW_RUN_FOLDER", "")  # so that what a command sets is taken back afterwards
    monkeypatch.delenv("GFLOW_RUN_FOLDER")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with CIFAR-10's files, of a few real images."""
    with pytest.MonkeyPatch.context() as patch:
        yield str(write_cifar10(tmp_path_factory.mktemp("cifar10"), patch))


@pytest.fixture(scope="module")
def report(data, tmp_path_factory):
    """What `gflow test` says of a pruned vgg13, and the module itself."""
    torch.manual_seed(0)
    module = gflow_pl.ImageClassifier("vgg13", num_classes=10).eval()
    graph = gflow_pl.trace_channels(module, torch.zeros(1, 3, 32, 32))
    scores = gflow_pl.score_filters(module, "magnitude", graph=graph)
    gflow_pl.rewrite(module, graph, gflow_pl.select_units(graph, scores, 0.5))
    contents = {"state_dict": module.state_dict()}
    add_structure(module, contents)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("report"))
        patch.setattr(sys, "argv", ["gflow"])
        torch.save(contents, "pruned.ckpt")
        options = ["--pretrained", "pruned.ckpt", "--data", "CIFAR10", "--data.root", data, "--name", "tested"]
        assert main(["test", *VGG, *options, *QUIET]) == 0
        networks = json.loads(Path("checkpoints/tested/report.json").read_text())["networks"]
    return SimpleNamespace(module=module, **networks)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """The folder of a run of three epochs: a warm-up, a round, and one more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        patch.setattr(sys, "argv", ["gflow"])
        options = [*VGG, "--data", "CIFAR10", "--data.root", data, "--trainer.max_epochs", "3", "--name", "run"]
        pruning = ["--pruning.warmup_epochs", "1", "--pruning.rounds", "1", "--pruning.num_samples", "10"]
        assert main(["prune", *options, *pruning, *QUIET]) == 0
        return Path("checkpoints/run").absolute()


# One check an option


def check_model(command: str) -> None:
    names = {"vgg": "vgg13", "mobilenet": "mobilenet_v1"} | {f"resnet-{n}": f"resnet{n}" for n in (56, 34, 18)}
    for ours in names.values() if command == "fit" else ["vgg13", "resnet56"]:
        made = parsed(command, "--model.network", ours).model.network
        assert [(n, p.shape) for n, p in made.named_parameters()] == [
            (n, p.shape) for n, p in build(ours, 10).named_parameters()
        ]


def check_seed(command: str) -> None:
    one, two, other = (parsed(command, *VGG, "--seed_everything", seed).model.state_dict() for seed in ("7", "7", "8"))
    assert same(one, two)
    assert not same(one, other)


def check_pretrained_path() -> None:
    net = build("vgg13", 10)
    torch.save({"net": {f"module.{name}": value for name, value in net.state_dict().items()}, "cfg": 0}, "vgg.pth")
    assert same(parsed("prune", *VGG, "--model.pretrained", "vgg.pth").model.network.state_dict(), net.state_dict())


def check_data_path(command: str, data: str) -> None:
    module = parsed(command, *VGG, "--data", "CIFAR10", "--data.root", data).datamodule
    module.setup()
    assert isinstance(module, CIFAR10)
    assert len(module.train_dataloader().dataset) == 50
    with pytest.raises(ValueError, match=r"--data\.root"):
        parsed(command, *VGG, "--data", "CIFAR10", "--data.root", "elsewhere")
    root = str(write_image_folder(Path("own"), num_classes=3))
    module = parsed(command, *VGG, "--data", "ImageFolder", "--data.root", root).datamodule
    assert isinstance(module, ImageFolder)
    assert module.num_classes == 3


def check_download(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Source(datasets.CIFAR10):
        def __init__(self, root, train=True, download=False):
            asked.append(download)

    monkeypatch.setattr(CIFAR10, "dataset", Source)
    with pytest.raises(ValueError, match=r"--data\.download"):
        parsed(command, *VGG, "--data", "CIFAR10")
    parsed(command, *VGG, "--data", "CIFAR10", "--data.download", "true").datamodule.prepare_data()
    assert asked == [True]


def check_pruning_type() -> None:
    same_name = ("biased_loss", "biased_loss_tracked", "grasp", "grad_preserve", "tfo", "fisher", "nvidia", "l1", "bn")
    for name, ours in {**{n: n for n in same_name}, "mag_based": "magnitude", "loss_based": "loss"}.items():
        assert PruningCallback(name).measure.name == ours
    for name, order in (("mag_based", 2), ("l1", 1)):
        seen = pruned("--pruning.measure", name)
        weight = seen.weights[1]["net.4.weight"]
        torch.testing.assert_close(seen.scores[0]["net.4"], weight.flatten(1).norm(p=order, dim=1))


def check_prune_percent() -> None:
    for fraction, left in (("0.25", 27), ("0.5", 18)):
        assert pruned("--pruning.fraction", fraction).pruning.rows[-1]["filters_left"] == left
    with pytest.raises(ValueError, match=r"write 0\.75"):
        parsed("prune", *VGG, "--pruning.fraction", "75")


def check_n_rounds() -> None:
    pruning = parsed("prune", *VGG, "--pruning.fraction", "0.75", "--pruning.rounds", "5").pruning
    assert pruning.cut_epochs == (1, 2, 3, 4, 5)
    kept = [pruning.schedule.kept_after(k) for k in range(1, 6)]
    assert kept == pytest.approx([5 * 0.25 / (0.75 * k + 5 * 0.25) for k in range(1, 6)])


def check_temperature(command: str) -> None:
    model = parsed(command, *VGG, "--model.temperature", "2").model.eval()
    batch = torch.randn(4, 3, 32, 32), torch.arange(4)
    assert torch.equal(model.training_step(batch, 0), F.cross_entropy(model(batch[0]) / 2, batch[1]))
    assert parsed(command, *VGG).model.temperature == 5


def check_grasp_temperature() -> None:
    grasp = ["--pruning.measure", "grasp"]
    usual = pruned(*grasp).scores[0]
    assert same(pruned(*grasp, "--pruning.temperature", "200").scores[0], usual)
    assert not same(pruned(*grasp, "--pruning.temperature", "50").scores[0], usual)


def check_imp_samples() -> None:
    counts = {}
    for number in ("16", "48"):
        pruning = parsed("prune", *VGG, "--pruning.measure", "loss", "--pruning.num_samples", number).pruning
        pruning.unpruned_path, counts[number] = None, 0

        def counted(module, batch, number=number):
            counts[number] += len(batch[0])
            return module.training_step(batch, 0)

        pruning.loss_fn = counted
        run = trainer(Path(), max_epochs=2, callbacks=[pruning], enable_checkpointing=False)
        run.fit(SmallModule(), loader(images(64)))
    # Beside the samples, the first batch is looked at before and after the cut.
    assert counts == {"16": 16 + 32, "48": 48 + 32}


def check_track_stats(folder: Path) -> None:
    rows = read_rows(folder / "metrics.csv")
    assert [row["phase"] for row in rows] == ["warmup", "pruning", "final"]
    assert all(0 <= row[name] <= 1 for row in rows for name in ("train_accuracy", "test_accuracy"))
    more = parsed("fit", *VGG, "--trainer.callbacks", "gflow_pl.GradientFlowMonitor").trainer.callbacks
    assert any(isinstance(callback, GradientFlowMonitor) for callback in more)


def check_num_classes(command: str) -> None:
    for name, cls, number in (("CIFAR10", CIFAR10, 10), ("CIFAR100", CIFAR100, 100)):
        made = parsed(command, *VGG, "--data", name, "--data.download", "true")
        assert isinstance(made.datamodule, cls)
        assert made.model(torch.zeros(1, 3, 32, 32)).shape == (1, number)


def check_moment() -> None:
    model = parsed("prune", *VGG, "--model.momentum", "0.5").model
    assert model.configure_optimizers()["optimizer"].param_groups[0]["momentum"] == 0.5


def check_warmup_epochs(folder: Path) -> None:
    assert parsed("prune", *VGG, "--pruning.warmup_epochs", "4").pruning.cut_epochs == (5,)
    assert [row["epoch"] for row in read_rows(folder / "pruning.csv")] == [2]


def check_thresholds() -> None:
    pruning = parsed("prune", *VGG, "--pruning.thresholds", "[0.1, 0.5, 0.8]").pruning
    assert pruning.cut_epochs == (1, 2, 3)
    assert [pruning.schedule.kept_after(k) for k in (1, 2, 3)] == pytest.approx([0.9, 0.5, 0.2])


def check_lr_prune() -> None:
    def moves(*settings: str) -> list[float]:
        weights = [state["net.9.bias"] for state in pruned(*settings).weights]
        return [float((one - two).abs().max()) for one, two in pairwise(weights)]

    held, free = moves("--pruning.prune_lr", "1e-6"), moves()
    assert 0 < held[0] < 1e-5 < 1e-3 < free[0]
    assert held[1] > 1e-3, "after the last round the module's own rate is back"


def check_preserve_moment() -> None:
    assert pruned("--pruning.keep_momentum", "true").states[1] > 0
    assert pruned().states[1] == 0


def check_track_importance() -> None:
    assert not same(pruned("--pruning.measure", "loss", "--pruning.track", "true").scores[0], passes("loss"))


def passes(measure: str, *settings: str) -> dict[str, torch.Tensor]:
    return pruned("--pruning.measure", measure, *settings).scores[0]


def check_track_batches() -> None:
    one, two = (passes("loss", "--pruning.track", "true", "--pruning.track_batches", n) for n in ("1", "3"))
    assert not same(one, two)


def check_alpha() -> None:
    tracked = ["--pruning.track", "true", "--pruning.alpha"]
    usual = passes("loss", "--pruning.track", "true")
    assert same(passes("loss", *tracked, "0.8"), usual)
    assert not same(passes("loss", *tracked, "0.3"), usual)
    newest = [passes("loss", *tracked, "1", "--pruning.track_batches", n) for n in ("1", "3")]
    assert same(*newest), "with 1 only the newest step counts"


def check_use_init() -> None:
    before_the_first_step = passes("loss", "--pruning.bias", "distance_from_init", "--pruning.epochs", "[0]")
    assert all(not vector.any() for vector in before_the_first_step.values())
    assert any(vector.any() for vector in passes("loss", "--pruning.bias", "distance_from_init").values())


def check_use_l2() -> None:
    assert same(passes("loss", "--pruning.bias", "magnitude"), passes("biased_loss"))
    assert not same(passes("loss"), passes("biased_loss"))


def check_bypass() -> None:
    measure = ["--pruning.measure", "biased_loss_tracked"]
    usual = parsed("prune", *VGG, *measure).pruning
    assert (usual.track, usual.keep_momentum, usual.bias) == (True, True, "magnitude")
    own = ["--pruning.track", "false", "--pruning.keep_momentum", "false", "--pruning.bias", "distance_from_init"]
    seen = pruned(*measure, *own)
    assert (seen.pruning.track, seen.pruning.keep_momentum) == (False, False)
    assert seen.states[1] == 0
    assert not same(seen.scores[0], passes("biased_loss_tracked"))


def check_pruned(report: SimpleNamespace) -> None:
    assert report.pruned["filters"] == report.unpruned["filters"] // 2 == 1472
    assert report.pruned["parameters"] == sum(p.numel() for p in report.module.parameters())


def check_accuracy(report: SimpleNamespace, split: str) -> None:
    pictures, labels = real_images(split)
    inputs = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        right = report.module(inputs).argmax(dim=1) == torch.from_numpy(labels)
    assert report.pruned[f"{split}_accuracy"] == pytest.approx(right.double().mean().item(), abs=1e-6)


def check_flops(report: SimpleNamespace) -> None:
    assert report.unpruned["macs"] == 228_267_008
    assert report.pruned["flops"] == 2 * report.pruned["macs"] < report.unpruned["flops"]


def check_compression(report: SimpleNamespace) -> None:
    size = {name: getattr(report, name)["state_bytes"] for name in ("unpruned", "pruned")}
    assert report.pruned["compression"] == pytest.approx(size["unpruned"] / size["pruned"])


# The table


class Row(NamedTuple):
    scripts: str
    option: str
    ours: str
    check: Callable[..., None]


ROWS = [
    Row("main, train, eval", "model", "--model.network", check_model),
    Row("main, train", "seed", "--seed_everything", check_seed),
    Row("main", "pretrained_path", "--model.pretrained", check_pretrained_path),
    Row("main, train, eval", "data_path", "--data.root", check_data_path),
    Row("main, train, eval", "download", "--data.download", check_download),
    Row("main, train, eval", "num_classes", "--data", check_num_classes),
    Row("main, train", "T", "--model.temperature", check_temperature),
    Row("main, train", "track_stats", "metrics.csv", check_track_stats),
    Row("main", "pruning_type", "--pruning.measure", check_pruning_type),
    Row("main", "prune_percent", "--pruning.fraction", check_prune_percent),
    Row("main", "n_rounds", "--pruning.rounds", check_n_rounds),
    Row("main", "grasp_T", "--pruning.temperature", check_grasp_temperature),
    Row("main", "imp_samples", "--pruning.num_samples", check_imp_samples),
    Row("main", "moment", "--model.momentum", check_moment),
    Row("main", "warmup_epochs", "--pruning.warmup_epochs", check_warmup_epochs),
    Row("main", "thresholds", "--pruning.thresholds", check_thresholds),
    Row("main", "lr_prune", "--pruning.prune_lr", check_lr_prune),
    Row("main", "preserve_moment", "--pruning.keep_momentum", check_preserve_moment),
    Row("main", "track_importance", "--pruning.track", check_track_importance),
    Row("main", "track_batches", "--pruning.track_batches", check_track_batches),
    Row("main", "alpha", "--pruning.alpha", check_alpha),
    Row("main", "use_init", "--pruning.bias distance_from_init", check_use_init),
    Row("main", "use_l2", "--pruning.bias magnitude", check_use_l2),
    Row("main", "bypass", "--pruning.track", check_bypass),
    Row("eval", "pruned", "--pretrained", check_pruned),
    Row("eval", "model_path", "--pretrained", check_pruned),
    Row("eval", "train_acc", "report.json", check_accuracy),
    Row("eval", "test_acc", "report.json", check_accuracy),
    Row("eval", "flops", "report.json", check_flops),
    Row("eval", "compression", "report.json", check_compression),
]
COMMANDS = {"main": "prune", "train": "fit", "eval": "test"}


def cases():
    for row in ROWS:
        takes = row.check.__code__.co_varnames[: row.check.__code__.co_argcount]
        for script in row.scripts.split(", ") if "command" in takes else row.scripts.split(", ")[:1]:
            yield pytest.param(row, COMMANDS[script], takes, id=f"{script}-{row.option}")


@pytest.mark.filterwarnings("ignore:Asked to remove")
@pytest.mark.parametrize(("row", "command", "takes"), list(cases()))
def test_a_published_option_has_a_setting_that_takes_effect(row, command, takes, request) -> None:
    known = {"command": lambda: command, "split": lambda: row.option.removesuffix("_acc")}
    row.check(*(known[name]() if name in known else request.getfixturevalue(name) for name in takes))


def test_no_published_option_is_left_out() -> None:
    for script, options in (("main", MAIN), ("train", TRAIN), ("eval", EVAL)):
        assert {row.option for row in ROWS if script in row.scripts.split(", ")} == options


def test_the_readme_names_them_all() -> None:
    section = README.read_text().partition("## Coming from the published scripts\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "| `" in line]
    shown = {(re.sub("`", "", cells[0]), option) for cells in lines for option in re.findall(r"`(\w+)`", cells[1])}
    assert shown == {(row.scripts, row.option) for row in ROWS}
    for row in ROWS:
        here = next(cells[2] for cells in lines if cells[0] == row.scripts and f"`{row.option}`" in cells[1])
        assert row.ours in here, row.option

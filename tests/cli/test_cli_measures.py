"""``gflow prune`` with every measure."""

import logging
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from gflow_pl import ImageClassifier
from gflow_pl.__main__ import main
from gflow_pl.files import read_rows
from gflow_pl.importance import measure_names, resolve_measure

NAMES = measure_names(aliases=True)
FILTERS = {"vgg13": 2944, "resnet56": 2128, "mobilenet_v1": 10944}
"""Number of filters of the layers that can be pruned."""
OPTIONS = {
    "plain": [],
    "tracked": ["--pruning.track", "true", "--pruning.track_batches", "2"],
    "published_order": ["--pruning.track", "true", "--pruning.track_order", "published"],
    "magnitude": ["--pruning.bias", "magnitude"],
    "distance": ["--pruning.bias", "distance_from_init"],
    "thresholds": ["--pruning.thresholds", "[0.2,0.5]"],
    "momentum": ["--pruning.keep_momentum", "true"],
    "tracked_distance": ["--pruning.track", "true", "--pruning.bias", "distance_from_init"],
}
TINY = ["--data", "Digits", "--data.batch_size", "8", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
TINY += ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "3"]
TINY += ["--trainer.enable_model_summary", "false", "--pruning.num_samples", "16"]


def prune(name: str, *options: str) -> Path:
    """Prune in two rounds on the digits; return the folder of the run."""
    rounds = [] if "--pruning.thresholds" in options else ["--pruning.fraction", "0.5", "--pruning.rounds", "2"]
    assert main(["prune", *TINY, *rounds, *options, "--name", name]) == 0
    return Path("checkpoints") / name


def settings_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())["pruning"]


def filters_in(module: ImageClassifier, layers: set[str]) -> int:
    return sum(module.get_submodule(layer).weight.shape[0] for layer in layers)


def check(folder: Path, measure: str, network: str, kept: tuple[float, float]) -> None:
    """Check rows, counts, losses and files of a run of two rounds."""
    rows, total = read_rows(folder / "pruning.csv"), FILTERS[network]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {row["measure"] for row in rows} == {resolve_measure(measure).name}
    step = 2 if network == "mobilenet_v1" else 1  # a unit of a depthwise pair holds two filters
    for row, share in zip(rows, kept, strict=True):
        left = total - math.floor((1 - share) * total + 1e-9)
        assert left <= row["filters_left"] < left + step
        assert row["filters_removed"] > 0
        for name in ("loss_before", "loss_after", "gradient_norm_before", "gradient_norm_after"):
            assert math.isfinite(row[name]), name
    metrics = read_rows(folder / "metrics.csv")
    assert [row["filters"] for row in metrics] == [total, *(row["filters_left"] for row in rows)]
    assert all(math.isfinite(row["train_loss"]) and math.isfinite(row["test_loss"]) for row in metrics)

    module = ImageClassifier.load_from_checkpoint(folder / "last.ckpt", weights_only=True).eval()
    assert sum(p.numel() for p in module.parameters()) == rows[-1]["parameters"]
    with torch.no_grad():
        assert module(torch.randn(2, 3, 32, 32)).isfinite().all()


KEPT = {"thresholds": (0.8, 0.5)}
PUBLISHED = (2 / 3, 0.5)


def run_and_check(measure: str, network: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = prune("run", "--model.network", network, "--pruning.measure", measure, *OPTIONS[option])
    check(folder, measure, network, KEPT.get(option, PUBLISHED))
    settings = settings_of(folder)
    assert settings["measure"] == measure
    assert settings["track"] is (
        "track" in option or option == "published_order" or resolve_measure(measure).is_tracked
    )
    assert settings["keep_momentum"] is (option == "momentum" or resolve_measure(measure).is_tracked)


# Each measure once, and each network and each option several times.
SLICE = [
    (measure, list(FILTERS)[i % len(FILTERS)], list(OPTIONS)[(i + i // len(OPTIONS)) % len(OPTIONS)])
    for i, measure in enumerate(NAMES)
]


@pytest.mark.parametrize(("measure", "network", "option"), SLICE)
def test_a_measure_prunes_a_network_in_two_rounds(measure, network, option, tmp_path, monkeypatch) -> None:
    run_and_check(measure, network, option, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("network", FILTERS)
@pytest.mark.parametrize("measure", NAMES)
def test_every_measure_with_every_option_prunes_every_network(measure, network, option, tmp_path, monkeypatch) -> None:
    run_and_check(measure, network, option, tmp_path, monkeypatch)


def test_the_slice_touches_every_measure_network_and_option() -> None:
    assert {measure for measure, _, _ in SLICE} == set(NAMES)
    assert {network for _, network, _ in SLICE} == set(FILTERS)
    assert {option for _, _, option in SLICE} == set(OPTIONS)


def test_the_help_lists_every_measure(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    help_of_measure = text.rpartition("--pruning.measure MEASURE")[2].split("--pruning.fraction")[0]
    assert all(re.search(rf"\b{name}[,.]", help_of_measure) for name in NAMES)


def test_a_measure_and_its_alias_are_the_same_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = prune("one", "--model.network", "resnet56", "--pruning.measure", "loss")
    two = prune("two", "--model.network", "resnet56", "--pruning.measure", "loss_based")
    first, second = (torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# The measure with defaults of its own for other settings


def test_a_tracked_measure_changes_defaults_and_that_is_logged(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        folder = prune("run", "--model.network", "resnet56", "--pruning.measure", "biased_loss_tracked")
    assert "biased_loss_tracked with track True, bias magnitude, keep_momentum True." in caplog.text
    assert "no step was tracked" not in caplog.text
    settings = settings_of(folder)
    assert (settings["track"], settings["bias"], settings["keep_momentum"]) == (True, "magnitude", True)
    assert settings["alpha"] == 0.8


def test_an_explicit_setting_wins_over_the_default_of_a_tracked_measure(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    explicit = ["--pruning.track", "false", "--pruning.bias", "none", "--pruning.keep_momentum", "false"]
    with caplog.at_level(logging.INFO):
        measure = ["--pruning.measure", "biased_loss_tracked", "--pruning.alpha", "0.5"]
        folder = prune("run", "--model.network", "resnet56", *measure, *explicit)
    assert "biased_loss_tracked with track False, bias none, keep_momentum False." in caplog.text
    settings = settings_of(folder)
    assert (settings["track"], settings["bias"], settings["keep_momentum"]) == (False, "none", False)
    assert settings["alpha"] == 0.5


# Custom measures

CUSTOM = '''
from gflow_pl.importance import Importance


class Mine(Importance):
    """Sum of |theta g| to a power."""

    name = "mine"
    statistic = "gradient"

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def summand(self, theta, flow):
        return (theta * flow).abs() ** self.power


class Nameless(Importance):
    def summand(self, theta, flow):
        return theta


class Vague(Nameless):
    name = "vague"
'''


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    (tmp_path / "my_measures.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def test_a_custom_measure_runs_by_its_class_path(my_package) -> None:
    Path("mine.yaml").write_text(
        "pruning: {measure: {class_path: my_measures.Mine, init_args: {power: 2.0}}, track: true, bias: magnitude}\n"
    )
    folder = prune("mine", "--config", "mine.yaml", "--model.network", "resnet56")
    rows = read_rows(folder / "pruning.csv")
    assert {row["measure"] for row in rows} == {"mine"}
    assert rows[-1]["filters_left"] == 1064
    assert settings_of(folder)["measure"] == {"class_path": "my_measures.Mine", "init_args": {"power": 2.0}}
    assert settings_of(folder)["track"] is True
    last = torch.load(folder / "last.ckpt", weights_only=True)
    assert not any("measure" in name or "pruning" in name for name in last["hyper_parameters"])

    # The saved settings alone repeat the run.
    assert main(["prune", "--config", str(folder / "config.yaml"), "--name", "again"]) == 0
    again = torch.load("checkpoints/again/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in last["state_dict"].items())


def test_a_custom_measure_with_the_formula_of_loss_prunes_like_it(my_package) -> None:
    options = ["--model.network", "resnet56"]
    mine = prune("mine", *options, "--pruning.measure", "my_measures.Mine", "--pruning.measure.power", "1.0")
    theirs = prune("loss", *options, "--pruning.measure", "loss")
    first, second = (torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (mine, theirs))
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("grasp2", "Unknown measure 'grasp2'"),
        ("my_measures.Yours", "Unknown measure 'my_measures.Yours'"),
        ("my_measures.Nameless", "Measure Nameless has no name"),
        ("my_measures.Vague", "Measure 'vague': `statistic` must be one of weights, noise, gradient"),
    ],
)
def test_an_invalid_measure_is_refused(value, sentence, my_package, capsys) -> None:
    try:
        status = main(["prune", *TINY, "--model.network", "resnet56", "--pruning.measure", value])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert "Traceback" not in message

"""The settings of a PruningCallback: every argument is checked, at construction and when it is set anew."""

import inspect
import pickle
from copy import deepcopy

import pytest

from gflow_pl import PruningCallback
from gflow_pl.callbacks.pruning_settings import (
    CutTimes,
    RoundSettings,
    ScoringSettings,
    SelectionSettings,
    SettingAttributes,
    TraceSettings,
    TrackingSettings,
)
from gflow_pl.common.errors import SettingsError
from gflow_pl.importance import Magnitude

ARGUMENTS = [name for name in inspect.signature(PruningCallback.__init__).parameters if name != "self"]
ATTRIBUTES = [name for name in vars(SettingAttributes) if not name.startswith("_")]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_value_of_any_argument_raises_an_error_that_names_it(name) -> None:
    """No argument accepts a bare object, so a new one that is not checked fails here."""
    with pytest.raises(SettingsError, match=rf"`{name}`"):
        PruningCallback(**{name: object()})


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_wrong_value_of_an_attribute_raises_an_error_and_changes_nothing(name) -> None:
    callback = PruningCallback()
    before = getattr(callback, name)
    with pytest.raises(SettingsError, match=rf"`{name}`"):
        setattr(callback, name, object())
    assert getattr(callback, name) is before


def test_every_argument_that_is_no_time_or_share_is_an_attribute() -> None:
    described_by_schedule_and_times = {
        "fraction", "rounds", "thresholds", "published_truncation", "warmup_epochs", "every_n_epochs", "epochs",
    }  # fmt: skip
    assert set(ATTRIBUTES) == set(ARGUMENTS) - described_by_schedule_and_times


def test_an_attribute_that_is_set_anew_is_used_and_the_others_stay() -> None:
    def loss_fn(module, batch):
        return module(batch).sum()

    callback = PruningCallback("fisher", num_samples=64, batches=2)
    callback.loss_fn = loss_fn
    callback.num_samples = 128
    callback.unpruned_path = "unpruned.ckpt"
    assert callback.scoring_settings == ScoringSettings(callback.measure, num_samples=128, batches=2, loss_fn=loss_fn)
    assert callback.round_settings == RoundSettings(unpruned_path="unpruned.ckpt")
    callback.measure = "magnitude"
    assert isinstance(callback.measure, Magnitude)


def test_the_documentation_names_every_argument() -> None:
    text = inspect.getdoc(PruningCallback) or ""
    for name in ARGUMENTS:
        assert f"\n    {name}: " in text


def test_the_callers_list_is_copied() -> None:
    names = ["net.0"]
    callback = PruningCallback(ignore=names)
    names.append("net.1")
    assert callback.ignore == ["net.0"]


@pytest.mark.parametrize(
    ("measure", "expected"),
    [("loss", (False, False, None, 0.8)), ("biased_loss_tracked", (True, True, "magnitude", 0.8))],
)
def test_a_tracked_measure_decides_what_the_caller_leaves_open(measure, expected) -> None:
    callback = PruningCallback(measure)
    assert (callback.track, callback.keep_momentum, callback.bias, callback.alpha) == expected
    explicit = PruningCallback(measure, track=False, keep_momentum=False, bias="none", alpha=0.5)
    assert (explicit.track, explicit.keep_momentum, explicit.bias, explicit.alpha) == (False, False, "none", 0.5)


@pytest.mark.parametrize("clone", [deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_callback_can_be_copied_and_pickled_with_its_settings(clone) -> None:
    callback = PruningCallback("grasp", thresholds=[0.2, 0.5], warmup_epochs=1, scope="layer")
    again = clone(callback)
    assert again.scope == "layer"
    assert again.cut_epochs == callback.cut_epochs
    again.scope = "global"
    assert callback.scope == "layer"


@pytest.mark.parametrize(
    "settings", [TrackingSettings(), TraceSettings(), SelectionSettings(), RoundSettings(), CutTimes(2)]
)
def test_settings_objects_are_frozen(settings) -> None:
    name = next(iter(vars(settings)))
    with pytest.raises(AttributeError):
        setattr(settings, name, None)


def test_round_k_is_cut_at_the_start_of_epoch_warmup_plus_k() -> None:
    assert CutTimes(3).epochs == (1, 2, 3)
    assert CutTimes(3, warmup_epochs=2).epochs == (3, 4, 5)
    assert CutTimes(2, warmup_epochs=1, every_n_epochs=3).epochs == (4, 7)
    assert CutTimes(3, epochs=[0, 3, 9]).epochs == (0, 3, 9)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"warmup_epochs": -1}, "`warmup_epochs` must be a whole number >= 0, got -1."),
        ({"every_n_epochs": 0}, "`every_n_epochs` must be a whole number >= 1, got 0."),
        ({"epochs": [1]}, "`epochs` names 1 cuts, but there are 2 rounds"),
        ({"epochs": [3, 1]}, "`epochs` must ascend"),
        ({"epochs": [-1, 1]}, "whole numbers >= 0"),
        ({"epochs": [1, 2], "warmup_epochs": 1}, "leave `warmup_epochs`"),
    ],
)
def test_wrong_times_raise_an_error_of_one_sentence(arguments, sentence) -> None:
    with pytest.raises(ValueError) as error:
        CutTimes(2, **arguments)
    assert sentence in str(error.value)


def test_a_last_cut_that_no_epoch_follows_raises() -> None:
    times = CutTimes(2, warmup_epochs=1)  # cuts at 2 and 3
    times.check_fits(4)
    times.check_fits(None)
    times.check_fits(-1)
    with pytest.raises(ValueError, match="set max_epochs to at least 4"):
        times.check_fits(3)

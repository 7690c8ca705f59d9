"""Figures, read back from the axes that were saved."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from gflow_pl.reports import layers_figure, training_figure, write_rows

LEFT = [100, 100, 60, 40, 40, 40]


@pytest.fixture
def rows():
    phases = ["warmup", "warmup", "pruning", "pruning", "final", "final"]
    return [
        {
            "epoch": epoch,
            "phase": phases[epoch],
            "train_accuracy": 0.5 + epoch / 20,
            "test_accuracy": None if epoch == 3 else 0.4 + epoch / 20,
            "filters": LEFT[epoch],
        }
        for epoch in range(6)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """Record the figures that are saved, in order."""
    figures, save = [], Figure.savefig

    def recording_savefig(self, *args, **options):
        figures.append(self)
        return save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", recording_savefig)
    return figures


def line(axes, label):
    (found,) = [one for one in axes.lines if one.get_label() == label]
    return found


def vertical_lines(axes):
    return sorted(
        one.get_xdata()[0] for one in axes.lines if len(one.get_xdata()) == 2 and len(set(one.get_xdata())) == 1
    )


def test_accuracies_and_filters_are_drawn_over_the_epochs(rows, drawn, tmp_path):
    write_rows(tmp_path / "metrics.csv", rows)
    training_figure(tmp_path / "metrics.csv", tmp_path / "training.png", title="resnet56_digits")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    upper, lower = drawn[0].axes
    np.testing.assert_allclose(line(upper, "train").get_ydata(), 50 + 5 * np.arange(6))
    test = line(upper, "test").get_ydata()
    assert np.isnan(test[3])
    np.testing.assert_allclose(np.delete(test, 3), np.delete(40 + 5 * np.arange(6), 3))
    (steps,) = [one for one in lower.lines if one.get_drawstyle().startswith("steps")]
    np.testing.assert_array_equal(steps.get_ydata()[1:], LEFT)
    np.testing.assert_allclose(steps.get_xdata(), np.arange(7) - 0.5)


def test_a_line_is_drawn_before_every_epoch_that_starts_with_a_cut(rows, drawn, tmp_path):
    training_figure(rows, tmp_path / "training.png")
    assert [vertical_lines(axes) for axes in drawn[0].axes] == [[1.5, 2.5], [1.5, 2.5]]


def test_phases_are_shaded_and_named_once(rows, drawn, tmp_path):
    training_figure(rows, tmp_path / "training.png")
    for axes in drawn[0].axes:
        bands = [(p.get_x(), p.get_x() + p.get_width()) for p in axes.patches]
        assert bands == [(-0.5, 1.5), (1.5, 3.5), (3.5, 5.5)]
    assert [[text.get_text() for text in axes.texts] for axes in drawn[0].axes] == [["warmup", "pruning", "final"], []]


def test_axes_have_units_and_the_figure_has_the_title(rows, drawn, tmp_path):
    training_figure(rows, tmp_path / "training.png", title="resnet56_digits")
    upper, lower = drawn[0].axes
    assert upper.get_title(loc="left") == "resnet56_digits"
    assert upper.get_ylabel() == "accuracy (%)"
    assert lower.get_ylabel() == "filters left (number)"
    assert lower.get_xlabel() == "epoch (counted from 0)"


def test_the_figure_of_a_run_without_pruning_has_no_filters(rows, drawn, tmp_path):
    bare = [{key: value for key, value in row.items() if key not in ("filters", "phase")} for row in rows]
    training_figure(bare, tmp_path / "training.png")
    (axes,) = drawn[0].axes
    assert vertical_lines(axes) == []
    training_figure(rows[:1], tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


def test_rows_without_epochs_are_refused(tmp_path):
    for rows in ([], [{"loss": 1.0}]):
        with pytest.raises(ValueError, match="needs rows with a column 'epoch'"):
            training_figure(rows, tmp_path / "training.png")
    with pytest.raises(ValueError, match="at least one layer"):
        layers_figure({}, {}, tmp_path / "layers.png")
    assert not list(tmp_path.iterdir())


def test_bars_show_the_filters_of_every_layer_before_and_after(drawn, tmp_path):
    layers_figure({"a": 4, "b": 8, "c": 2}, {"a": 3, "b": 5}, tmp_path / "layers.png", title="run")
    (axes,) = drawn[0].axes
    before, left = axes.containers
    assert [bar.get_height() for bar in before] == [4, 8, 2]
    assert [bar.get_height() for bar in left] == [3, 5, 0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert axes.get_title(loc="left") == "run: 8 of 14 filters left (57.1%)"


def test_the_backend_of_matplotlib_does_not_change(rows, tmp_path):
    before = matplotlib.rcParams["backend"]
    training_figure(rows, tmp_path / "training.png")
    assert matplotlib.rcParams["backend"] == before

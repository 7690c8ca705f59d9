"""The file of predictions: most probable classes, in the order of the images."""

import pytest
import torch

from gflow_pl.common.errors import SettingsError
from gflow_pl.reports import write_predictions

BATCHES = [torch.tensor([[0.1, 0.9], [0.75, 0.25]]), torch.tensor([[0.5, 0.5]])]


def test_every_image_has_its_most_probable_class(tmp_path) -> None:
    write_predictions(tmp_path / "p.csv", BATCHES, ["a.png", "b.png", "c.png"], ["cat", "dog"])
    assert (tmp_path / "p.csv").read_text() == (
        "image,class,probability\na.png,dog,0.900000\nb.png,cat,0.750000\nc.png,cat,0.500000\n"
    )


def test_without_names_images_and_classes_are_numbered(tmp_path) -> None:
    write_predictions(tmp_path / "p.csv", BATCHES)
    assert [line.split(",")[:2] for line in (tmp_path / "p.csv").read_text().splitlines()[1:]] == [
        ["0", "1"],
        ["1", "0"],
        ["2", "0"],
    ]


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([], "there are no images"),
        ([BATCHES[0], torch.zeros(3)], "must return class probabilities"),
        (["a"], "must return class probabilities"),
    ],
)
def test_what_is_not_a_table_of_probabilities_is_refused(batches, sentence, tmp_path) -> None:
    with pytest.raises(SettingsError, match=sentence):
        write_predictions(tmp_path / "p.csv", batches)
    assert not list(tmp_path.iterdir())

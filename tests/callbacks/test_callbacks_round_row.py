"""The rows of the rounds, and the place of pruning.csv."""

import json
import os
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateFinder, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from small_nets import SmallModule, images, trainer

from gflow_pl import PruningCallback
from gflow_pl.callbacks import RunRecorder
from gflow_pl.files import read_rows


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")


def prune(folder, rounds=2, *, ckpt_path=None, rows_path=None, more=(), **options) -> PruningCallback:
    pl.seed_everything(0)
    pruning = PruningCallback("magnitude", fraction=0.5, rounds=rounds, rows_path=rows_path)
    run = trainer(folder, callbacks=[pruning, *more], **options)
    run.fit(SmallModule(), DataLoader(images(32), batch_size=16), ckpt_path=ckpt_path, weights_only=True)
    return pruning


def tables(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.csv") if path.name != "metrics.csv")


def plain(rows) -> list[dict]:
    return [{name: None if value == "" else value for name, value in row.items()} for row in rows]


def test_rows_are_written_into_the_folder_of_the_run(tmp_path) -> None:
    pruning = prune(tmp_path / "without")
    assert read_rows(tmp_path / "without" / "pruning.csv") == plain(pruning.rows)
    assert len(pruning.rows) == 2

    prune(tmp_path, logger=CSVLogger(tmp_path, name="logged", version=3))
    assert tables(tmp_path) == ["logged/version_3/pruning.csv", "without/pruning.csv"]

    logged = [row for row in read_rows(tmp_path / "logged/version_3/metrics.csv") if row["pruning/round"]]
    for name in ("filters_removed", "units_removed", "parameters", "loss_before", "gradient_norm_after"):
        assert [row[f"pruning/{name}"] for row in logged] == [row[name] for row in pruning.rows]

    prune(tmp_path / "root", rows_path=str(tmp_path / "chosen" / "mine.csv"))
    assert tables(tmp_path) == ["chosen/mine.csv", "logged/version_3/pruning.csv", "without/pruning.csv"]


class Remote(Logger):
    """A logger without a folder, or with one on another machine."""

    name, version = "remote", 0

    def __init__(self, save_dir: str | None = None) -> None:
        super().__init__()
        self._save_dir = save_dir

    @property
    def save_dir(self):
        return self._save_dir

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_a_logger_without_a_local_folder(tmp_path) -> None:
    prune(tmp_path, logger=Remote(), enable_checkpointing=False)
    assert tables(tmp_path) == ["pruning.csv"]
    os.remove(tmp_path / "pruning.csv")
    prune(tmp_path, logger=Remote("memory://there"), enable_checkpointing=False)
    assert tables(tmp_path) == []
    assert os.listdir(tmp_path / "working") == []


def test_trials_of_a_finder_write_no_rows(tmp_path) -> None:
    pruning = PruningCallback("magnitude", fraction=0.5, rounds=1, epochs=[0])
    run = trainer(tmp_path, callbacks=[pruning], fast_dev_run=True)
    run.fit(SmallModule(), DataLoader(images(32), batch_size=16))
    assert pruning.rows
    assert tables(tmp_path) == []

    seen = []

    class Looks(LearningRateFinder):
        def lr_find(self, trainer, pl_module):
            super().lr_find(trainer, pl_module)
            seen.append(tables(tmp_path))

    prune(tmp_path, more=[Looks(num_training_steps=5)])
    assert seen == [[]]
    assert tables(tmp_path) == ["pruning.csv"]


def test_a_resumed_run_rewrites_the_rows_of_its_checkpoint(tmp_path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole = prune(tmp_path / "whole", more=[keep])
    at_start = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, *_):
            at_start.append(len(read_rows(tmp_path / "again" / "pruning.csv")))

    # A row that the checkpoint knows nothing of, of a run that was killed.
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "pruning.csv").write_text("round,epoch\n1,1\n2,2\n3,3\n")
    prune(tmp_path / "again", ckpt_path=tmp_path / "epoch=1.ckpt", more=[Look()])
    assert at_start == [1]
    rows = [read_rows(tmp_path / name / "pruning.csv") for name in ("whole", "again")]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds")
    assert rows[0] == rows[1]
    assert len(rows[0]) == len(whole.rows) == 2

    # With all rounds done, too.
    prune(tmp_path / "late", ckpt_path=tmp_path / "epoch=2.ckpt")
    assert len(read_rows(tmp_path / "late" / "pruning.csv")) == 2


def test_the_rows_of_another_run_are_never_replaced(tmp_path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{epoch}", save_top_k=-1)
    (tmp_path / "pruning.csv").write_text("my,own,table\n")
    one = prune(tmp_path, more=[keep])
    two = prune(tmp_path, rounds=1)
    assert tables(tmp_path) == ["pruning-v1.csv", "pruning-v2.csv", "pruning.csv"]
    assert (tmp_path / "pruning.csv").read_text() == "my,own,table\n"
    assert read_rows(tmp_path / "pruning-v1.csv") == plain(one.rows)
    assert read_rows(tmp_path / "pruning-v2.csv") == plain(two.rows)

    # A run that is resumed, from before its first round or after it, goes on with its own file.
    for epoch in (0, 1):
        again = prune(tmp_path, ckpt_path=tmp_path / "kept" / f"epoch={epoch}.ckpt")
        assert tables(tmp_path) == ["pruning-v1.csv", "pruning-v2.csv", "pruning.csv"]
        assert read_rows(tmp_path / "pruning-v1.csv") == plain(again.rows)
    assert read_rows(tmp_path / "pruning-v2.csv") == plain(two.rows)


def test_rows_that_cannot_be_written_warn_once_and_training_continues(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"rows cannot be written to '.*/file/pruning.csv' \(") as warnings:
        pruning = prune(tmp_path / "file", enable_checkpointing=False)
    assert pruning.finished
    assert len([w for w in warnings if "cannot be written" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("path", "reason"), [("folder", "it is a folder"), ("folder/file/mine.csv", "'.*/folder/file' is not a folder")]
)
def test_a_rows_path_that_cannot_be_written_raises_at_the_start(path, reason, tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    with pytest.raises(
        ValueError, match=rf"the rounds' rows cannot be written to `rows_path` '.*{path}', since {reason}\.$"
    ):
        prune(tmp_path, rows_path=tmp_path / path)


def test_rows_are_written_only_into_the_folder_of_a_recorder(tmp_path) -> None:
    pruning = prune(tmp_path / "root", more=[RunRecorder(tmp_path / "run")])
    assert tables(tmp_path) == ["run/pruning.csv"]
    assert read_rows(tmp_path / "run" / "pruning.csv") == plain(pruning.rows)


def test_rows_are_written_into_the_folder_of_the_current_recorder(tmp_path) -> None:
    pruning = PruningCallback("magnitude", thresholds=[0.2, 0.5], epochs=[1, 2])
    module, data = SmallModule(), DataLoader(images(32), batch_size=16)
    for name in ("one", "two"):
        more = [RunRecorder(tmp_path / name), pruning]
        trainer(tmp_path, callbacks=more, enable_checkpointing=False).fit(module, data)
    trainer(tmp_path / "root", callbacks=[pruning], enable_checkpointing=False).fit(module, data)
    assert pruning.rows_path is None
    assert tables(tmp_path) == ["one/pruning.csv", "root/pruning.csv", "two/pruning.csv"]


def test_the_row_and_the_line_count_the_units_and_filters_that_each_layer_lost(tmp_path, caplog) -> None:
    """A unit of a coupled stream is one unit and a filter of each of its layers."""
    pl.seed_everything(0)
    module = SmallModule()
    before = {name: m.out_channels for name, m in module.named_modules() if isinstance(m, torch.nn.Conv2d)}
    pruning = PruningCallback("magnitude", fraction=0.5, rounds=1, residual="remove", protect_stem=False)
    with caplog.at_level("INFO"):
        trainer(tmp_path, callbacks=[pruning]).fit(module, DataLoader(images(32), batch_size=16))
    (row,) = pruning.rows
    lost = {name: before[name] - m.out_channels for name, m in module.named_modules() if isinstance(m, torch.nn.Conv2d)}
    lost = {name: count for name, count in lost.items() if count}
    assert json.loads(row["removed_by_layer"]) == json.loads(row["units_removed_by_layer"]) == lost
    assert row["filters_removed"] == sum(lost.values())
    coupled = lost["net.0"]
    assert coupled == lost["net.3.conv2"] > 0
    assert row["units_removed"] == row["filters_removed"] - coupled
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Round 1 of 1")]
    assert f"{row['units_removed']} units with {row['filters_removed']} filters removed" in line

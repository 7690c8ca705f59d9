"""Rows of CSV files read back as they were written, and files are written atomically."""

import os
import stat
from pathlib import Path

import pytest

from gflow_pl.files import read_rows, write_rows, write_text

ROWS = [
    {"epoch": 0, "phase": "warmup", "loss": 0.1 + 0.2, "accuracy": None},
    {"epoch": 1, "phase": 'a, "quoted" one', "loss": 1e-300, "accuracy": 1.0, "extra": -3},
]


def test_rows_read_back_as_they_were_written(tmp_path):
    write_rows(tmp_path / "runs" / "metrics.csv", ROWS)
    assert read_rows(tmp_path / "runs" / "metrics.csv") == [{**ROWS[0], "extra": None}, ROWS[1]]


def test_named_columns_come_first_even_without_values(tmp_path):
    write_rows(tmp_path / "metrics.csv", ROWS[:1], columns=["phase", "filters"])
    assert (
        tmp_path / "metrics.csv"
    ).read_bytes() == b"phase,filters,epoch,loss,accuracy\nwarmup,,0,0.30000000000000004,\n"


def test_a_file_without_rows_has_its_header(tmp_path):
    write_rows(tmp_path / "metrics.csv", [], columns=["epoch"])
    assert read_rows(tmp_path / "metrics.csv") == []
    assert (tmp_path / "metrics.csv").read_text() == "epoch\n"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    write_rows(path, ROWS)
    before = path.read_bytes()

    def full_disk(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_rows(path, [{"epoch": 9}])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_text(path, "old")
    seen = []
    replace = os.replace

    def recording_replace(source, target):
        seen.append((path.read_text(), Path(source).read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", recording_replace)
    write_text(path, "new")
    assert seen == [("old", "new")]
    assert path.read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_has_the_usual_permissions(tmp_path):
    write_text(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")}
    assert len(modes) == 1

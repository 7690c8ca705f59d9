"""The table and the report.json of ``gflow test``."""

import json

import pytest

from gflow_pl.reports import NetworkReport, comparison_table, table_text, write_report

UNPRUNED = NetworkReport("unpruned", macs=125_747_840, parameters=855_770, state_bytes=3_512_345, filters=2_128)
PRUNED = NetworkReport(
    "pruned",
    macs=31_436_960,
    parameters=103_770,
    state_bytes=492_345,
    filters=532,
    train_accuracy=0.99812,
    test_accuracy=0.98125,
)


def cells(text, label):
    (line,) = [line for line in text.splitlines() if line.startswith(f"│ {label}")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_two_networks_are_compared_with_the_remaining_share():
    text = table_text(comparison_table([UNPRUNED, PRUNED]))
    assert cells(text, "Multiply-accumulates") == ["125,747,840", "31,436,960", "25.0%"]
    assert cells(text, "FLOPs") == ["251,495,680", "62,873,920", "25.0%"]
    assert cells(text, "Parameters") == ["855,770", "103,770", "12.1%"]
    assert cells(text, "Filters") == ["2,128", "532", "25.0%"]
    assert cells(text, "Saved size") == ["3.51 MB", "0.49 MB", "14.0%"]
    assert cells(text, "Compression") == ["1.00x", "7.13x", ""]


def test_what_was_not_measured_is_a_dash():
    text = table_text(comparison_table([UNPRUNED, PRUNED]))
    assert cells(text, "Test accuracy") == ["-", "98.12 %", ""]
    assert cells(text, "Train accuracy") == ["-", "99.81 %", ""]
    text = table_text(comparison_table([NetworkReport("a"), NetworkReport("b")]))
    for label in ("Multiply-accumulates", "Parameters", "Filters", "Saved size"):
        assert cells(text, label) == ["-", "-", "-"]
    assert cells(text, "Compression") == ["-", "-", ""]


def test_the_table_fits_in_80_columns_without_a_terminal():
    big = NetworkReport("unpruned", macs=10**12, parameters=10**10, state_bytes=4 * 10**10, filters=10**6)
    text = table_text(comparison_table([big, PRUNED], title="checkpoints/" + "long_name_" * 12))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "2,000,000,000,000" in text
    assert "\x1b" not in text
    assert "a fused multiply-add" in " ".join(text.split())


def test_a_table_of_one_network_has_no_column_for_the_remaining_share():
    text = table_text(comparison_table([PRUNED]))
    assert cells(text, "Filters") == ["532"]


def test_the_report_contains_the_same_numbers(tmp_path):
    write_report(tmp_path / "report.json", [UNPRUNED, PRUNED], {"checkpoint": "best.ckpt"})
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["version"] == 1
    assert data["checkpoint"] == "best.ckpt"
    assert list(data["networks"]) == ["unpruned", "pruned"]
    assert data["networks"]["unpruned"]["test_accuracy"] is None
    assert data["networks"]["pruned"] == {
        "test_accuracy": 0.98125,
        "train_accuracy": 0.99812,
        "macs": 31_436_960,
        "flops": 62_873_920,
        "parameters": 103_770,
        "filters": 532,
        "state_bytes": 492_345,
        "compression": 3_512_345 / 492_345,
    }


def test_nan_is_refused_and_no_file_remains(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path / "report.json", [NetworkReport("a", test_accuracy=float("nan"))])
    assert not list(tmp_path.iterdir())

"""Counts, tables and figures of a run."""

from gflow_pl.files import read_rows, write_rows
from gflow_pl.reports.counts import Counts, count_network, state_bytes
from gflow_pl.reports.figures import layers_figure, training_figure
from gflow_pl.reports.table import NetworkReport, comparison_table, report_data, table_text, write_report

__all__ = [
    "Counts",
    "NetworkReport",
    "comparison_table",
    "count_network",
    "layers_figure",
    "read_rows",
    "report_data",
    "state_bytes",
    "table_text",
    "training_figure",
    "write_report",
    "write_rows",
]

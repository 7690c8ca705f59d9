"""Counts, sizes, tables, figures and predictions of a run."""

from gflow_pl.files import read_rows, write_rows
from gflow_pl.reports.counts import Counts, count_network, state_bytes
from gflow_pl.reports.figures import layers_figure, training_figure
from gflow_pl.reports.predictions import write_predictions
from gflow_pl.reports.size import Size
from gflow_pl.reports.table import NetworkReport, comparison_table, report_data, table_text, write_report

__all__ = [
    "Counts",
    "NetworkReport",
    "Size",
    "comparison_table",
    "count_network",
    "layers_figure",
    "read_rows",
    "report_data",
    "state_bytes",
    "table_text",
    "training_figure",
    "write_predictions",
    "write_report",
    "write_rows",
]

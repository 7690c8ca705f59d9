"""Counts, tables and figures of a run."""

from gflow_pl.reports.counts import Counts, count_network, state_bytes
from gflow_pl.reports.rows import read_rows, write_rows

__all__ = ["Counts", "count_network", "read_rows", "state_bytes", "write_rows"]

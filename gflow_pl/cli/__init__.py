"""The commands: everything is assembled here, nothing is decided here."""

from gflow_pl.cli.run import run

__all__ = ["run"]

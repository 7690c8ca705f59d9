"""The commands. This room assembles the other rooms, and contains no logic of training or pruning."""

from gflow_pl.cli.run import run

__all__ = ["run"]

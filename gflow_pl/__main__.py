"""The command ``gflow``. Help and version are printed without importing torch, which takes seconds."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from gflow_pl import __version__

COMMANDS = {
    "fit": "Train a network.",
    "prune": "Train a network, prune its filters over several rounds, and continue training.",
    "finetune": "Train a pruned network from a file further, with a new optimizer.",
    "validate": "Measure a checkpoint on the validation data.",
    "test": "Report accuracy, multiply-accumulates, FLOPs, parameters and compression of a checkpoint.",
    "predict": "Write the class and its probability for every image to predictions.csv.",
}
"""Name of every command to its summary, the first line of the docstring of the method of `GflowTrainer`."""

_HELP = """usage: gflow [-h] [--version] COMMAND [OPTIONS]

Structured pruning while you train, for PyTorch Lightning.

commands:
{commands}

To list the options of a command, use gflow COMMAND --help. Settings can also come from YAML files, which are given by
their path or by the name of a shipped file: gflow prune --config demo. Every run writes to a new folder \
in checkpoints/.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command and its options; None takes them from `sys.argv`.

    Returns:
        The exit status: 0 for success, 2 for an error that the user can correct, 130 after Ctrl-C.
    """
    # Answer what needs no import.
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP.format(commands="\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"gflow_pl {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        print(f"gflow: unknown command '{arguments[0]}'. Known: {', '.join(COMMANDS)}.{hint}", file=sys.stderr)
        return 2

    # Run the command. Lightning uses names that jsonargparse has deprecated: silence the warnings. Version 5, which
    # removes these names, is excluded by our requirements.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from gflow_pl.cli import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())

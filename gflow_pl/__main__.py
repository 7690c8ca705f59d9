"""The command ``gflow``: answers help and version at once, and loads the rest only when there is work to do."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from gflow_pl import __version__

COMMANDS = {
    "fit": "Train a network.",
    "prune": "Train a network, prune its filters over rounds, train on.",
    "finetune": "Train on from a pruned file: epoch 0, fresh optimizer, pruned shape kept.",
    "validate": "Measure a checkpoint on the validation data.",
    "test": "Report accuracy, multiply-accumulates, FLOPs, parameters and compression of a checkpoint.",
    "predict": "Write the class and its probability for every image.",
}

_HELP = """usage: gflow [-h] [--version] COMMAND [OPTIONS]

Structured pruning while you train, for PyTorch Lightning.

commands:
{commands}

Every command explains its options: gflow prune --help. Settings come from YAML files as well, by path or by the name
of one that is shipped: gflow prune --config demo. What is written goes to a folder of its own under checkpoints/.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 success, 2 bad input)."""
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
    # Lightning calls three names that jsonargparse 4 has marked for removal in 5; our pin keeps them.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from gflow_pl.cli import run  # here: it imports torch and Lightning, which takes seconds

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())

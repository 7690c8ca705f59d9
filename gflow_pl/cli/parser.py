"""An argument parser whose errors are one sentence."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pytorch_lightning.cli import LightningArgumentParser

__all__ = ["OneSentenceParser", "one_sentence"]


class OneSentenceParser(LightningArgumentParser):
    """Says in one sentence what is wrong, and the nearest valid name where a name is; no usage, no traceback."""

    def error(self, message: Any, ex: Exception | None = None) -> NoReturn:
        """Prints the sentence and exits with status 2."""
        print(f"gflow: {one_sentence(str(message), self._known_keys())}", file=sys.stderr)
        sys.exit(2)

    def _known_keys(self) -> list[str]:
        keys = {action.dest for action in self._actions if action.dest not in ("help", "config", "print_config")}
        for parser in self.__dict__.get("_subcommands_parsers", {}).values():
            keys |= {action.dest for action in parser._actions}
        return sorted(keys)


def one_sentence(message: str, known: Sequence[str] = ()) -> str:
    """The telling lines of jsonargparse's message, in one."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    dull = (
        "Given value",
        "Problem with given class_path",
        "Does not validate against any",
        "Errors:",
        "Subtypes:",
        "Expected a <class 'NoneType'>",
    )
    telling = [line for line in lines if not line.startswith(dull)]
    text = "; ".join(dict.fromkeys(telling or lines))
    name = re.search(r"(?:key|option|arguments?:?|Key|Option) ['\"]?(?:--)?([\w.]+)", text)
    if name and known:
        close = difflib.get_close_matches(name.group(1), known, n=1, cutoff=0.7)
        if close and close[0] != name.group(1):
            text += f" Did you mean '{close[0]}'?"
    return text

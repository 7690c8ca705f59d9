"""An argument parser whose errors are one sentence."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from gflow_pl import data

__all__ = ["OneSentenceParser", "one_sentence"]


# How lines begin that say nothing to a user.
_DULL = (
    "Given value",
    "Problem with given class_path",
    "Does not validate against any",
    "Errors:",
    "Subtypes:",
    "Expected a <class 'NoneType'>",
)


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
        return sorted(keys | set(data.__all__))


def one_sentence(message: str, known: Sequence[str] = ()) -> str:
    """The telling lines of jsonargparse's message, in one, and the nearest of the names that are `known`."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    telling = [line for line in lines if not line.startswith(_DULL)] or lines
    # That something is no file either says little beside what else it is not.
    telling = [line for line in telling if "either not accessible or invalid" not in line] or telling
    text = "; ".join(dict.fromkeys(telling)).replace(":;", ":")
    key = re.search(r"(?:key|option|arguments?:?|Key|Option) ['\"]?(?:--)?([\w.]+)", text)
    text = re.sub(r'^Parser key "([\w.]+)":', r"`\1`:", text).replace(". Got value: ", ", got ")
    text = re.sub(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal(\[.*?\]))", r"expected \1\2", text)
    given = next((line.partition(": ")[2] for line in lines if line.startswith("Given value: ")), None)
    if given is not None and given not in text:
        text += f", got {given}"
    for name in (key.group(1) if key else None, given):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7) if name else []
        if close and close[0] != name:
            text += f". Did you mean '{close[0]}'?"
            break
    return text

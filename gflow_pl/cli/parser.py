"""An argument parser that reports an error in one sentence."""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser
from typing_extensions import override

from gflow_pl import data
from gflow_pl.common.errors import SettingsError

__all__ = ["OneSentenceParser", "condense"]

# Beginnings of lines that add nothing for a user.
_UNINFORMATIVE = (
    "Given value",
    "Problem with given class_path",
    "Does not validate against any",
    "Errors:",
    "Subtypes:",
    "Expected a <class 'NoneType'>",
)


class OneSentenceParser(LightningArgumentParser):
    """Report errors in one sentence with the nearest valid name, without usage lines and traceback."""

    @override
    def error(self, message: object, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and exit with status 2."""
        print(f"gflow: {condense(str(message), self._known_names())}", file=sys.stderr)
        sys.exit(2)

    @override
    def add_instantiator(self, instantiator: Callable[..., Any], class_type: type, *args: Any, **kwargs: Any) -> None:
        """Register a function that creates a class's objects, so that its errors pass through `instantiate_classes`."""
        super().add_instantiator(self._recording_errors(instantiator), class_type, *args, **kwargs)

    @override
    def instantiate_classes(self, cfg: Namespace, **kwargs: Any) -> Namespace:
        """Create the objects of all settings. An error of a constructor is raised as it is.

        jsonargparse tries all types of a Union, and replaces their errors by a list of messages, in which the type and
        traceback of the error of a constructor would be lost.

        Raises:
            SettingsError: A constructor raised a ValueError or did not find a file: it rejects its settings.
        """
        self._constructor_errors: list[Exception] = []
        # Instantiators apply in the order of registration: this one to all classes that have no other.
        self.add_instantiator(_create, object, subclasses=True)
        try:
            return super().instantiate_classes(cfg, **kwargs)
        except ValueError as error:
            if self._constructor_errors and error is not self._constructor_errors[0]:
                original = self._constructor_errors[0]
                raise original from original.__cause__
            raise

    def _recording_errors(self, instantiator: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap an instantiator so that the errors of constructors are recorded."""

        @functools.wraps(instantiator)  # jsonargparse reads the signature
        def create(class_type: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return instantiator(class_type, *args, **kwargs)
            except (SettingsError, ValueError, FileNotFoundError, PermissionError) as error:
                rejected = (
                    error if isinstance(error, SettingsError) else SettingsError(f"{class_type.__name__}: {error}")
                )
                self._constructor_errors.append(rejected)
                raise rejected from error.__cause__ if rejected is error else error
            except Exception as error:
                self._constructor_errors.append(error)
                raise

        return create

    def _known_names(self) -> list[str]:
        """Return the names of all options and data modules."""
        names = {action.dest for action in self._actions if action.dest not in ("help", "config", "print_config")}
        for parser in self.__dict__.get("_subcommands_parsers", {}).values():
            names |= {action.dest for action in parser._actions}
        return sorted(names | set(data.__all__))


def _create(class_type: type, *args: Any, **kwargs: Any) -> object:
    return class_type(*args, **kwargs)


def condense(message: str, known: Sequence[str] = ()) -> str:
    """Condense an error message of jsonargparse to one sentence.

    Args:
        message: The message, of several lines.
        known: Valid names. If the message is about a similar name, the sentence suggests the nearest of them.
    """
    # Keep the informative lines. The line that a value is not a file is dropped if another line gives a reason.
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    informative = [line for line in lines if not line.startswith(_UNINFORMATIVE)] or lines
    informative = [line for line in informative if "either not accessible or invalid" not in line] or informative
    text = "; ".join(dict.fromkeys(informative)).replace(":;", ":")

    # Shorten the phrases for the key, the expected type and the given value.
    key = re.search(r"(?:key|option|arguments?:?|Key|Option) ['\"]?(?:--)?([\w.]+)", text)
    text = re.sub(r'^Parser key "([\w.]+)":', r"`\1`:", text).replace(". Got value: ", ", got ")
    text = re.sub(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal(\[.*?\]))", r"expected \1\2", text)
    given = next((line.partition(": ")[2] for line in lines if line.startswith("Given value: ")), None)
    if given is not None and given not in text:
        text += f", got {given}"

    # Suggest the nearest name.
    for name in (key.group(1) if key else None, given):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7) if name else []
        if close and close[0] != name:
            text += f". Did you mean '{close[0]}'?"
            break
    return text

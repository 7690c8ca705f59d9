"""The error for settings, arguments and files that a user can correct."""

from __future__ import annotations

__all__ = ["SettingsError"]


class SettingsError(ValueError):
    """A setting, an argument or a file that the user can correct.

    The message is one sentence: where, what was expected, what was given, and what to do. The commands print it without
    a traceback and exit with status 2; every other exception is a bug and keeps its traceback.
    """

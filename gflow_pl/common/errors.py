"""The error for settings, arguments and files that a user can correct."""

from __future__ import annotations

__all__ = ["SettingsError"]


class SettingsError(ValueError):
    """An error in a setting, an argument or a file that the user can correct.

    The message is one sentence: where the error is, what was expected and given, and what to do. The commands print it
    without a traceback and exit with status 2. Every other exception is a bug and keeps its traceback.
    """

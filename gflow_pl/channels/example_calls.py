"""The calls of a model that the example inputs of a trace describe."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from gflow_pl.channels.forward_runner import Call, Calls
from gflow_pl.common.errors import SettingsError

__all__ = ["calls_of_examples", "keywords_of"]


def calls_of_examples(
    model: nn.Module, example_inputs: object, example_kwargs: Mapping[str, Any] | None, more_examples: Iterable[object]
) -> list[Calls]:
    """Return the calls that the examples describe, in every way in which they can be read, the likeliest first.

    Args:
        model: The model.
        example_inputs: See `trace_channels`.
        example_kwargs: See `trace_channels`.
        more_examples: See `trace_channels`.

    Raises:
        SettingsError: There is no example, or an argument has another type than it should have.
    """
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise SettingsError(
            f"trace_channels: `example_kwargs` must be a dict from the names of arguments to their values, got "
            f"{type(example_kwargs).__name__}."
        )
    if example_inputs is None and example_kwargs is None:
        raise SettingsError(
            "trace_channels: give an example of the model's inputs: `example_inputs`, `example_kwargs`."
        )
    if not isinstance(more_examples, (list, tuple)):
        raise SettingsError(
            f"trace_channels: `more_examples` must be a list of examples, got {type(more_examples).__name__}."
        )

    # Positional arguments, and the keyword arguments that a dict may stand for.
    first = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    examples = [(() if example_inputs is None and example_kwargs is not None else first, dict(example_kwargs or {}))]
    examples += [(example if isinstance(example, tuple) else (example,), {}) for example in more_examples]
    by_position = [_call(model, args, kwargs) for args, kwargs in examples]
    by_keyword = [
        call if keywords is None or kwargs else _call(model, (), keywords)
        for call, (args, kwargs) in zip(by_position, examples, strict=True)
        for keywords in [keywords_of(model, args[0]) if len(args) == 1 else None]
    ]
    readings = [by_position]
    if any(a is not b for a, b in zip(by_position, by_keyword, strict=True)):
        readings.append(by_keyword)
    return [{True: calls, False: calls} for calls in readings]


def keywords_of(model: nn.Module, value: object) -> dict[str, Any] | None:
    """Return a dict or another mapping as keyword arguments of a model's forward; None if it cannot be passed so."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return None
    keywords = {str(key): value[key] for key in value}
    try:
        inspect.signature(model.forward).bind(**keywords)
    except (TypeError, ValueError):  # other names, or no signature at all
        return None
    return keywords


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    if not kwargs:
        return model, args
    return (lambda args, kwargs: model(*args, **kwargs)), (args, kwargs)

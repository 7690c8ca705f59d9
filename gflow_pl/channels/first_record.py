"""Find a way to run a model's forward that can be recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gflow_pl.channels.corrections import Corrections
from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.record import Record
from gflow_pl.channels.record_forward import record_forward
from gflow_pl.common.errors import SettingsError

__all__ = ["RunnerOf", "first_record"]

RunnerOf = Callable[..., ForwardRunner]
"""``runner_of(meta=..., doubled=...)`` returns a runner of a model."""


def first_record(readings: Sequence[RunnerOf]) -> tuple[ForwardRunner, Record]:
    """Return the first runner whose forward works in both modes, with its record.

    Meta tensors come first, because nothing is computed on them; then real tensors, for forwards that look at values.
    Inputs of one example are doubled at first, because batch norms may refuse them in training mode. If no forward
    works in both modes, the runner with the fewest errors is returned: what the others reached is frozen.

    Args:
        readings: The ways to read the example inputs, the likeliest first.

    Raises:
        SettingsError: The forward raises on the example inputs in both modes, also without being recorded.
    """
    attempts = []
    for meta in (True, False):
        for runner_of in readings:
            for doubled in (True, False):
                runner = runner_of(meta=meta, doubled=doubled)
                record = record_forward(runner, Corrections())
                if not record.errors:
                    return runner, record
                attempts.append((runner, record))
    best = min(attempts, key=lambda attempt: len(attempt[1].errors))
    if len(best[1].errors) == 2:
        _check_that_forward_works(readings)
    return best


def _check_that_forward_works(readings: Sequence[RunnerOf]) -> None:
    """Run the forward without recording it.

    Raises:
        SettingsError: It raises for every reading of the example inputs, in both modes.
    """
    errors: dict[bool, Exception] = {}
    for runner_of in readings:
        runner = runner_of(meta=False, doubled=False)
        for training in (True, False):
            with runner.placeholders_set(runner.placeholders(), training):
                try:
                    runner.run_as_it_is()
                except Exception as error:  # a forward may raise anything
                    errors[training] = error
                else:
                    return
    cause = errors[runner.model.training]
    name, first_line = type(runner.model).__name__, str(cause).strip().partition("\n")[0]
    raise SettingsError(
        f"trace_channels: the forward of {name} raises on the example inputs ({type(cause).__name__}: {first_line}); "
        "pass arguments that it accepts as `example_inputs` (a tuple of positional arguments) or `example_kwargs`."
    ) from cause

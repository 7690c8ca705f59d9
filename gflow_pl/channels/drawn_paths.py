"""Find the modules that a forward pass runs or skips by chance (LayerDrop, stochastic depth, a random branch).

A recorded pass shows one of the paths that such a forward can take. Other draws show the others: all draws low, all
draws high, so that every comparison with a draw has both results, and some seeds, for draws that cannot be replaced.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.placeholder_mode import PlaceholderMode
from gflow_pl.channels.record import Record
from gflow_pl.common.snapshot import random_states_restored, seed_generators

__all__ = ["freeze_drawn_modules", "has_drawn"]

_LOW, _HIGH = 0.0, 1 - 2.0**-20
_WAYS: tuple[tuple[float | None, int], ...] = ((_LOW, 0), (_HIGH, 0), (None, 1), (None, 2), (None, 3))
"""The value of all draws (None: what the generators give), and the seed."""

_UNIFORM = frozenset(["rand", "rand_like", "uniform_"])
_NORMAL = frozenset(["randn", "randn_like", "normal_", "normal"])
_READS_VALUES = frozenset(["_local_scalar_dense", "is_nonzero", "item", "nonzero", "equal"])
_REASON = "a random number decides whether it runs"


def has_drawn(record: Record, training: bool) -> bool:
    """Return whether the pass that just ended drew numbers that could steer its path.

    Call it before the generators are restored. Numbers of torch steer the path only if the pass read values.
    """
    python, numpy, host = _states()
    if (python, numpy) != _seeded_states()[:2]:
        return True
    has_read = any(operator.name in _READS_VALUES for operator in record.operators.get(training, ()))
    return has_read and not torch.equal(host, _seeded_states()[2])


def freeze_drawn_modules(record: Record, runner: ForwardRunner, training: bool) -> None:
    """Freeze all channels of the modules that not every pass runs.

    Args:
        record: The record, to which the frozen labels are added.
        runner: The model and its inputs.
        training: The mode of the pass that drew numbers.
    """
    drawn = runner.drawn_modules.get(training)
    if drawn is None:
        drawn = runner.drawn_modules[training] = _drawn_modules(runner, training)
    inner = tuple(f"{name}." for name in drawn)
    for source, start, stop in list(record.constraints.ranges()) if inner else ():
        tensor = getattr(source, "tensor", None)
        if isinstance(tensor, str) and tensor.startswith(inner):
            record.constraints.freeze(np.arange(start, stop), _REASON)


def _drawn_modules(runner: ForwardRunner, training: bool) -> frozenset[str]:
    """Return the names of the modules that some passes run and others do not. A pass that raises does not count."""
    passes: list[set[str]] = []
    for level, seed in _WAYS:
        placeholders = runner.placeholders()
        mode = _DrawMode(runner, placeholders, level)
        called: set[str] = set()

        def note(name: str, module: nn.Module, args: tuple[Any, ...], called: set[str] = called) -> None:
            called.add(name)

        with runner.placeholders_set(placeholders, training), _python_draws_at(level):
            seed_generators(seed)
            try:
                runner.run(mode, note, None)
            except Exception:  # a forward may raise anything, for draws that it never gets
                continue
        passes.append(called)
    run_by_some: set[str] = set().union(*passes)
    return frozenset(name for name in run_by_some if not all(name in called for called in passes))


class _DrawMode(PlaceholderMode):
    """Runs a forward pass without recording it, with given values for the draws of torch.

    Args:
        runner: The model and its inputs.
        placeholders: See `PlaceholderMode`.
        level: The value of all draws; None leaves them.
    """

    def __init__(self, runner: ForwardRunner, placeholders: dict[int, Tensor], level: float | None) -> None:
        flow = runner.data_flow(placeholders, is_recorded=False)
        super().__init__(placeholders, runner.meta, runner.shape_cache, flow)
        self._level = level

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator; replace what it draws."""
        name = func._schema.name.removeprefix("aten::")
        args, kwargs, _ = self.prepare(name, args, kwargs or {})
        output = self.compute(func, args, kwargs)
        self.keep_alive.append(output)
        if self._level is not None and isinstance(output, Tensor) and not output.is_meta:
            if name in _UNIFORM:
                output.fill_(self._level)
            elif name in _NORMAL:
                output.fill_(-4.0 if self._level < 0.5 else 4.0)
            elif name.startswith("bernoulli"):
                output.fill_(round(self._level))
        return output


@contextmanager
def _python_draws_at(level: float | None) -> Iterator[None]:
    """Replace the uniform draws of Python's and NumPy's global generators for a block; None leaves them."""
    if level is None:
        yield
        return

    def array(*size: int) -> Any:
        return np.full(size, level) if size else level

    def sized(size: Any = None) -> Any:
        return level if size is None else np.full(size, level)

    replaced: list[tuple[Any, str, Any]] = [
        (random, "random", lambda: level),
        (random, "uniform", lambda a, b: a + (b - a) * level),
        (np.random, "rand", array),
        (np.random, "random", sized),
        (np.random, "random_sample", sized),
        (np.random, "uniform", lambda low=0.0, high=1.0, size=None: low + (high - low) * sized(size)),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, function in replaced:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def _states() -> tuple[Any, Any, Tensor]:
    """Return the states of the global generators of Python, NumPy and torch."""
    numpy = np.random.get_state(legacy=True)
    return random.getstate(), (numpy[2], numpy[1].tobytes()), torch.random.get_rng_state()  # type: ignore[index]


@cache
def _seeded_states() -> tuple[Any, Any, Tensor]:
    """Return the states at the start of every pass."""
    with random_states_restored():
        seed_generators(0)
        return _states()

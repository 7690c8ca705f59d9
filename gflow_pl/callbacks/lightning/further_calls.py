"""Steps of a module that run layers which neither its `forward` nor its training step runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from gflow_pl.callbacks.lightning.packages import attached_trainer, both_packages
from gflow_pl.callbacks.lightning.precision import with_true_precision
from gflow_pl.callbacks.lightning.scoring_batches import validation_batches
from gflow_pl.callbacks.lightning.silence import SideEffects
from gflow_pl.callbacks.lightning.step_trial import try_call
from gflow_pl.channels import Call
from gflow_pl.common.lightning_package import pl
from gflow_pl.importance.batches import first_examples

__all__ = ["further_calls"]

_STEPS = ("validation_step", "test_step", "predict_step")
_MAX_EXAMPLES = 32


def further_calls(
    module: pl.LightningModule,
    batch: object,
    reached: Collection[str],
    copies: Mapping[str, str],
    effects: SideEffects,
) -> tuple[list[Call], dict[str, str]]:
    """Return calls that run further layers, and the reasons why channels stay that the remaining layers could read.

    Args:
        module: The module.
        batch: A training batch.
        reached: Names of the modules that forward and training step run.
        copies: Copies of parts of the module, which are cut along whether anything runs them or not.
        effects: Side effects on the module, which are undone.
    """
    unread = {
        name
        for name, part in module.named_modules()
        if name not in reached
        and any(p.numel() and not is_lazy(p) for p in part.parameters(recurse=False))
        and not any(name == copied or name.startswith(f"{copied}.") for copied in copies)
    }
    calls: list[Call] = []
    for name in _STEPS if unread else ():
        defaults = [getattr(base, name, None) for base in both_packages(pl.LightningModule)]
        if getattr(type(module), name) in defaults or not unread:
            continue
        step = _step(name)
        for candidate in (*_validation_batch(module), batch):
            arguments = (module, candidate)
            trial = try_call(module, step, arguments, effects, training=False)
            if trial.error is None and trial.modules & unread:
                calls.append((step, arguments))
                unread -= trial.modules
                break
    reason = "'{}', which neither `forward` nor a step runs, could read it"
    return calls, {name: reason.format(name) for name in _entries(module, unread)}


def _entries(module: pl.LightningModule, unread: Collection[str]) -> list[str]:
    """Return the layers through which a feature could enter the parts of a module that nothing runs.

    In each part these are its first layer, and every layer whose input is wider or narrower than the outputs of all
    layers of the part.
    """
    entries = []
    layers = {name: part for name, part in module.named_modules() if name in unread}
    for prefix in _parts(module, "", unread):
        own = {n: part for n, part in layers.items() if n == prefix or n.startswith(f"{prefix}.")}
        made = {p.shape[0] for part in own.values() for p in part.parameters(recurse=False) if p.ndim}
        for number, (name, part) in enumerate(own.items()):
            weights = [p for p in part.parameters(recurse=False) if p.ndim > 1]
            read = {p.shape[1] * getattr(part, "groups", 1) for p in weights}
            if number == 0 or not read <= made:
                entries.append(name)
    return entries


def _parts(module: nn.Module, prefix: str, unread: Collection[str]) -> Iterator[str]:
    """Yield the outermost modules of which nothing has been run."""
    for leaf, child in module.named_children():
        name = f"{prefix}.{leaf}" if prefix else leaf
        own = [n for n, part in child.named_modules(prefix=name) if any(True for _ in part.parameters(recurse=False))]
        if not own:
            continue
        if all(n in unread for n in own) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield name
        elif any(n in unread for n in own):
            yield from _parts(child, name, unread)


def _step(name: str) -> Callable[..., Any]:
    """Return a function of a module and a batch that runs one of its steps."""

    @with_true_precision
    def step(module: pl.LightningModule, batch: Any) -> Any:
        return getattr(module, name)(batch, 0)

    return step


def _validation_batch(module: pl.LightningModule) -> list[object]:
    """Return the first validation batch, cut to few examples; nothing if there is none."""
    trainer = attached_trainer(module)
    try:
        batches = None if trainer is None else validation_batches(trainer, module, 1)
        return [] if batches is None else [first_examples(b, _MAX_EXAMPLES) for b in islice(batches, 1)]
    except Exception:  # the user's data may raise anything; validation is not under way
        return []

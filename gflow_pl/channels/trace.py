"""`trace_channels`: which channels of a network belong together, found by following one forward."""

from __future__ import annotations

from typing import Any

from torch import nn

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.expansions import STREAM, Expansions, add_residual_expansions, present_expansions
from gflow_pl.channels.forward_runner import Stage
from gflow_pl.channels.grouping import Partition, partition
from gflow_pl.channels.labels import ChoiceSite
from gflow_pl.channels.record import Survey, survey
from gflow_pl.channels.verify import Probe
from gflow_pl.common.snapshot import garbage_collection_paused
from gflow_pl.values import ChannelGraph, Layer
from gflow_pl.values.choices import Frozen, Residual, check_choice
from gflow_pl.values.expansion_names import is_index_buffer

__all__ = ["trace_channels"]

_ROUNDS = 24
_WIDTH = "what reads an expanded layer keeps its width"
_INPUT = "what an expanded layer reads keeps its width"


def trace_channels(
    model: nn.Module,
    example_inputs: Any,
    *,
    residual: Residual = "expand",
    exact_only: bool = False,
    frozen: Frozen = "keep",
) -> ChannelGraph:
    """Finds which channels of a network belong together and can go, for any module and without hints.

    DimLabels ride through a forward in training mode and one in evaluation mode, on tensors without contents where
    the forward allows it; then a probe runs the network at smaller shapes and everything that does not come out as
    predicted is frozen. The model, its flags, hooks and buffers, and all random generators are left as they were.

    Args:
        model: The network; a LightningModule is traced through its forward.
        example_inputs: What the forward takes: a tuple is the positional arguments, anything else the only one.
            Only shapes and types matter, unless the forward looks at values.
        residual: With "expand", every layer that writes into a residual stream loses filters by itself and the stream
            keeps its width; with "remove", the coupled stream shrinks.
        exact_only: Whether units are frozen whose removal changes what the rest computes.
        frozen: With "expand", layers that could not lose a filter otherwise are expanded, too.

    Returns:
        The graph: groups of units, and for every layer left the reason why.

    Raises:
        ValueError: `residual` or `frozen` is none of the choices, or a lazy layer was never run. A model that runs raises
            nothing else.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
        >>> print(trace_channels(net, torch.zeros(1, 3, 3, 3)))
        layer  filters  group  what happens
        0      8        0      removed
        4      10       -      frozen: the model's output
    """
    check_choice("residual", residual, Residual, caller="trace_channels")
    check_choice("frozen", frozen, Frozen, caller="trace_channels")
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with garbage_collection_paused():
        return _traced(model, args, residual, exact_only, frozen)


def _traced(model: nn.Module, args: tuple[Any, ...], residual: str, exact_only: bool, frozen: str) -> ChannelGraph:
    """Surveys and probes in turns, until everything comes out as predicted."""
    choices: dict[ChoiceSite, int] = {}
    frozen_calls: dict[tuple[bool, int], str] = {}
    ends: dict[bool, tuple[int, str]] = {}
    stage, found = _first_survey(model, args)
    for _ in range(_ROUNDS):
        expansions, parts = _partition(found, residual, frozen, exact_only, [])
        probe = Probe(stage, found, expansions, parts)
        blame = probe.shapes()
        soft: list[tuple[Labels, str]] = []
        if blame is None:
            soft, blame = probe.numbers()
        if blame is None:
            break
        if blame.site is not None:
            choices[blame.site] = choices.get(blame.site, 0) + 1
        elif blame.call is not None and blame.ends:
            ends[blame.call[0]] = blame.call[1], blame.reason
        elif blame.call is not None:
            frozen_calls[blame.call] = blame.reason
        found = survey(stage, choices, frozen_calls, ends)
    else:
        for call in (call for calls in found.calls.values() for call in calls):
            found.constraints.frozen += [(label, "the probe did not settle") for label in call.nodes]
        soft = []
        expansions, parts = _partition(found, residual, frozen, exact_only, [])
    if soft:
        _, parts = _partition(found, residual, frozen, exact_only, soft)
    return _graph(stage, found, parts)


def _first_survey(model: nn.Module, args: tuple[Any, ...]) -> tuple[Stage, Survey]:
    """The first way to run the forward that works in both modes: without contents, else on real tensors."""
    tries = []
    for meta in (True, False):
        for doubled in (True, False):
            stage = Stage(model, args, meta=meta, doubled=doubled)
            found = survey(stage, {}, {}, {})
            if not found.torn:
                return stage, found
            tries.append((stage, found))
    return min(tries, key=lambda pair: len(pair[1].torn))


def _partition(
    found: Survey, residual: str, frozen: str, exact_only: bool, soft: list[tuple[Labels, str]]
) -> tuple[Expansions, Partition]:
    expansions = present_expansions(found)
    if residual == "expand":
        add_residual_expansions(found, expansions)
    parts = partition(found, expansions, exact_only=exact_only, inexact=soft)
    while True:
        left = [found.layers[name] for name in parts.frozen if name not in parts.outputs]
        if frozen != "expand":
            # A branch is independent of the stream, also where a grouped convolution leads from one to the other.
            left = [f for f in left if f.grouped and (f.name in expansions.layers or parts.frozen[f.name] == STREAM)]
        whole = [facts for facts in left if facts.outputs is not None and facts.name not in expansions.layers]
        reads = [facts for facts in left if facts.grouped and not expansions.gathers(facts.name)]
        reads = [facts for facts in reads if not facts.votes or facts.name in expansions.layers]
        if not whole and not reads:
            break
        for facts in whole:
            expansions.add(found, facts.name, _WIDTH)
        for facts in reads:
            expansions.add_gather(facts.name, _INPUT)
        parts = partition(found, expansions, exact_only=exact_only, inexact=soft)
    return expansions, parts


def _graph(stage: Stage, found: Survey, parts: Partition) -> ChannelGraph:
    tensors = {name: x for name, x in stage.tensors.items() if not is_index_buffer(name)}
    order = [name for name in stage.modules if name in found.layers]
    layers: dict[str, Layer] = {}
    uses: dict[str, int] = {}
    for name in order:
        facts = found.layers[name]
        positions = facts.positions.get(False, facts.positions.get(True, 0))
        layers[name] = Layer(
            name=name,
            weight=facts.weight,
            num_filters=facts.num_filters,
            positions=positions,
            norm=facts.norm,
            reads_input=facts.reads_input,
            is_output=name in parts.outputs,
        )
        uses[facts.weight] = uses.get(facts.weight, 0) + positions
    return ChannelGraph(
        groups=parts.groups,
        frozen={name: parts.frozen[name] for name in order if name in parts.frozen},
        layers=layers,
        shapes={name: tuple(x.shape) for name, x in tensors.items()},
        uses=uses,
        patches=dict(parts.patches),
        buffers=frozenset(name for name, _ in stage.model.named_buffers() if not is_index_buffer(name)),
    )

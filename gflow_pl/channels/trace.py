"""`trace_channels`: find out which channels of a network belong together, by recording its forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import nn

from gflow_pl.channels.corrections import Corrections
from gflow_pl.channels.example_calls import calls_of_examples
from gflow_pl.channels.expansions import STREAM, Expansions, add_residual_expansions, present_expansions
from gflow_pl.channels.first_record import RunnerOf, first_record
from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.grouping import Partition, partition
from gflow_pl.channels.readings import misread_sites, num_removable, open_sites
from gflow_pl.channels.record import Record
from gflow_pl.channels.record_forward import record_forward
from gflow_pl.channels.unit_facts import Reasons
from gflow_pl.channels.verify import InexactLabels, Verifier
from gflow_pl.common.checks import check_choice
from gflow_pl.common.snapshot import garbage_collection_paused
from gflow_pl.values import ChannelGraph, Layer
from gflow_pl.values.choices import Frozen, Residual
from gflow_pl.values.expansion_names import is_index_buffer

__all__ = ["CallError", "trace_channels", "trace_runs"]

# Rounds in which choices are tried, rounds in which only what differs is frozen, and rounds in which groups next to it
# are frozen as well, twice as many in every round.
_CHOOSING_ROUNDS, _FREEZING_ROUNDS, _WIDENING_ROUNDS = 24, 12, 12
_MAX_READINGS = 6  # other readings of views and splits that a trace verifies
_OUTPUT_WIDTH = "what reads an expanded layer keeps its width"
_INPUT_WIDTH = "what an expanded layer reads keeps its width"


def trace_channels(
    model: nn.Module,
    example_inputs: object = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    more_examples: Sequence[object] = (),
    residual: Residual = "expand",
    exact_only: bool = False,
    frozen: Frozen = "keep",
) -> ChannelGraph:
    """Find out which channels of a network belong together and can be removed, for any module and without hints.

    The trace records all operators of a forward in training mode and of one in evaluation mode. A rule for every
    operator tells which channels of its outputs depend on which channels of its inputs. Then the trace verifies the
    result: it runs the network at smaller shapes, and freezes channels where a size does not come out as predicted.
    Both run on meta tensors, where nothing is computed, unless the forward looks at values. The model and all random
    generators are restored afterwards.

    Args:
        model: The network; a LightningModule is traced through its `forward`.
        example_inputs: Input of the forward: a tuple holds the positional arguments, anything else is the only
            argument. A dict whose keys are parameters of the forward is passed as keyword arguments where it cannot be
            passed as the only argument. Only shapes and dtypes matter, unless the forward looks at values. Every run
            gets copies, so the forward may change its inputs.
        example_kwargs: Keyword arguments of the forward, in addition to `example_inputs` or without them.
        more_examples: Further examples in the form of `example_inputs`, for forwards that take other paths on other
            inputs. Units are pruned only if all examples allow it.
        residual: ``"expand"``: every layer that writes into a residual stream loses filters independently, and the
            stream keeps its width. ``"remove"``: the stream shrinks, and all layers that write into it lose the same
            channels.
        exact_only: Whether to freeze units whose removal changes what the remaining channels compute.
        frozen: ``"expand"``: layers that could not lose any filter otherwise are expanded. ``"keep"``: they stay as
            they are.

    Returns:
        The graph: groups of units, and the reason for every layer that is frozen.

    Raises:
        SettingsError: An argument has an unknown value; a lazy layer of the model has no shape yet; the state of a
            module cannot be saved; or the forward raises on an example in both modes, whose own error is the cause. If
            it raises in one mode only, the other mode is traced, and what the failing mode reached is frozen. A forward
            that works but cannot be recorded does not raise; its layers are frozen.

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
    readings = calls_of_examples(model, example_inputs, example_kwargs, more_examples)
    with garbage_collection_paused():
        runners = [partial(ForwardRunner, model, (), calls=calls) for calls in readings]
        return trace_runs(runners, residual, exact_only, frozen)


class CallError(Exception):
    """A call that is traced has raised an error, which is its cause."""


def trace_runs(
    readings: Sequence[RunnerOf], residual: Residual, exact_only: bool, frozen: Frozen, *, must_run: bool = False
) -> ChannelGraph:
    """Record and verify in turns, until a verification finds no difference.

    Args:
        readings: Runners of the model, one for each way to read the example inputs.
        residual: See `trace_channels`.
        exact_only: See `trace_channels`.
        frozen: See `trace_channels`.
        must_run: Whether an error in either mode is raised; otherwise what ran before the error is frozen.

    Raises:
        CallError: The forward has failed in a mode, and `must_run` is set.
    """
    runner, record = first_record(readings)
    for error in record.errors.values() if must_run else ():
        raise CallError(f"{type(error).__name__}: {error}") from error
    choose = partial(_partition, residual=residual, frozen=frozen, exact_only=exact_only)
    settled = _better_reading(runner, _settle(runner, record, Corrections(), choose), choose)
    return _graph(runner, settled.record, settled.groups)


class _Choose(Protocol):
    """`_partition` with the settings of the trace."""

    def __call__(self, record: Record, *, inexact: Reasons = ...) -> tuple[Expansions, Partition]: ...


class _Settled(NamedTuple):
    """A record that a verification found to be right.

    Attributes:
        record: The record.
        groups: Its units and groups.
        corrections: The corrections that led to it.
    """

    record: Record
    groups: Partition
    corrections: Corrections


def _settle(runner: ForwardRunner, record: Record, corrections: Corrections, choose: _Choose) -> _Settled:
    """Verify a record and correct it, until a verification finds no difference.

    Args:
        runner: The model and its inputs.
        record: The record with these corrections.
        corrections: The corrections; more are added.
        choose: See `_partition`.
    """
    inexact: InexactLabels = []
    first_widening = _CHOOSING_ROUNDS + _FREEZING_ROUNDS
    for number in range(first_widening + _WIDENING_ROUNDS):
        corrections.is_choosing = number < _CHOOSING_ROUNDS
        corrections.num_neighbors = 2 ** (number - first_widening) if number >= first_widening else 0
        expansions, groups = choose(record)
        if not groups.groups:
            break
        verifier = Verifier(runner, record, expansions, groups, corrections)
        correction = verifier.check_shapes()
        if correction is None:
            inexact, correction = verifier.find_inexact()
        if correction is not None:
            corrections.add(correction)
        elif unneeded := verifier.unneeded_sizes():
            corrections.unneeded |= unneeded
        else:
            break
        record = record_forward(runner, corrections)
    else:
        for operators in record.operators.values():
            for labels in (labels for operator in operators for labels in operator.all_labels):
                record.constraints.freeze(labels, f"the verification still failed after {number + 1} corrections")
        inexact = []
        _, groups = choose(record)

    # Units that the verification found to be inexact.
    if inexact:
        _, groups = choose(record, inexact=inexact)
    return _Settled(record, groups, corrections)


def _better_reading(runner: ForwardRunner, settled: _Settled, choose: _Choose) -> _Settled:
    """Try other readings of views, splits and slices at which channels freeze or collapse into one unit.

    A reading wins if more filters can go with it, and a verification agrees.

    Args:
        runner: The model and its inputs.
        settled: The result with the first readings that a verification did not reject.
        choose: See `_partition`.
    """
    num_verified = 0
    tried = set()
    while sites := [pair for pair in open_sites(settled.record, settled.groups) if pair[0] not in tried]:
        site, num_left = sites[0]
        tried.add(site)
        for step in range(1, num_left + 1):
            if num_verified == _MAX_READINGS:
                return settled
            corrections = settled.corrections.with_choice(site, step)
            record = record_forward(runner, corrections)
            if num_removable(choose(record)[1]) <= num_removable(settled.groups):
                continue
            num_verified += 1
            other = _settle(runner, record, corrections, choose)
            if num_removable(other.groups) > num_removable(settled.groups):
                settled = other
                break

    # Where no reading is better, the view itself is the reason.
    for site, num_left in misread_sites(settled.record, settled.groups):
        corrections = settled.corrections.with_choice(site, num_left)
        other = _settle(runner, record_forward(runner, corrections), corrections, choose)
        if num_removable(other.groups) >= num_removable(settled.groups):
            settled = other
    return settled


def _partition(
    record: Record, residual: Residual, frozen: Frozen, exact_only: bool, inexact: Reasons = ()
) -> tuple[Expansions, Partition]:
    """Choose the layers to expand and form the units and groups.

    Args:
        record: The record of the model.
        residual: See `trace_channels`.
        frozen: See `trace_channels`.
        exact_only: See `trace_channels`.
        inexact: Further inexact labels beyond those of the record.
    """
    expansions = present_expansions(record)
    if residual == "expand":
        add_residual_expansions(record, expansions)
    groups = partition(record, expansions, exact_only=exact_only, inexact=inexact)

    # Expand further layers until no frozen layer is left that an expansion would free.
    while True:
        stuck = [record.layers[name] for name in groups.frozen if name not in groups.outputs]
        if frozen != "expand":
            # Only grouped convolutions between a residual stream and a branch: the branch has to stay independent.
            stuck = [
                facts
                for facts in stuck
                if facts.is_grouped and (facts.name in expansions.layers or groups.frozen[facts.name] == STREAM)
            ]
        scattered = [
            facts
            for facts in stuck
            if facts.outputs is not None and facts.module is not None and facts.name not in expansions.layers
        ]
        gathered = [
            facts
            for facts in stuck
            if facts.is_grouped
            and not expansions.gathers(facts.name)
            and (not facts.votes or facts.name in expansions.layers)
        ]
        if not scattered and not gathered:
            return expansions, groups
        for facts in scattered:
            expansions.add(record, facts.name, _OUTPUT_WIDTH)
        for facts in gathered:
            expansions.add_gather(facts.name, _INPUT_WIDTH)
        groups = partition(record, expansions, exact_only=exact_only, inexact=inexact)


def _layers_in_order(runner: ForwardRunner, record: Record) -> list[str]:
    """Return the names of the layers in the order of the modules, and within a module of its parameters."""
    places: dict[str, int] = {}
    for module_name, module in runner.modules.items():
        prefix = f"{module_name}." if module_name else ""
        for name in (module_name, *(prefix + leaf for leaf, _ in module._parameters.items())):
            places.setdefault(name, len(places))
    last = len(places)
    names = list(record.layers)
    return sorted(names, key=lambda name: places.get(name, places.get(record.layers[name].weight, last)))


def _graph(runner: ForwardRunner, record: Record, groups: Partition) -> ChannelGraph:
    """Collect what is known of layers, tensors and groups in a graph."""
    # Layers, in the order of `named_modules`.
    order = _layers_in_order(runner, record)
    layers: dict[str, Layer] = {}
    uses: dict[str, int] = {}
    for name in order:
        facts = record.layers[name]
        positions = facts.positions.get(False, facts.positions.get(True, 0))  # evaluation mode first
        layers[name] = Layer(
            name=name,
            weight=facts.weight,
            num_filters=facts.num_filters,
            positions=positions,
            norm=facts.norm,
            reads_input=facts.reads_input,
            is_output=name in groups.outputs,
            dim=facts.dim,
            bias=facts.bias,
            module=facts.module,
            output_dim=facts.output_dim,
            is_functional=facts.is_functional,
        )
        uses[facts.weight] = uses.get(facts.weight, 0) + positions
    # Tensors and groups. The index buffers of expansions are no part of the network.
    return ChannelGraph(
        groups=groups.groups,
        frozen={name: groups.frozen[name] for name in order if name in groups.frozen},
        layers=layers,
        shapes={name: tuple(x.shape) for name, x in runner.tensors.items() if not is_index_buffer(name)},
        uses=uses,
        patches=dict(groups.patches),
        buffers=frozenset(name for name, _ in runner.model.named_buffers() if not is_index_buffer(name)),
    )

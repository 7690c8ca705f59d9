"""Record a model's forward in training mode and in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable

from gflow_pl.channels.constraints import Constraints
from gflow_pl.channels.corrections import Corrections
from gflow_pl.channels.drawn_paths import freeze_drawn_modules, has_drawn
from gflow_pl.channels.forward_runner import ForwardRunner
from gflow_pl.channels.layer_hooks import LayerHooks
from gflow_pl.channels.operator_record import OperatorRecord
from gflow_pl.channels.record import Record
from gflow_pl.channels.recorder import Recorder
from gflow_pl.channels.rules.registry import RuleError
from gflow_pl.channels.unread_layers import freeze_for_unread
from gflow_pl.common.nested import iter_tensors
from gflow_pl.values.expansion_names import EXPANSION, GATHER

__all__ = ["record_forward"]


def record_forward(runner: ForwardRunner, corrections: Corrections) -> Record:
    """Record a forward pass in training mode and one in evaluation mode, and return one record of both.

    Args:
        runner: The model and its inputs.
        corrections: Corrections by the verifications of earlier records.
    """
    # Placeholders, and the names of what they replace.
    first_names = runner.names()
    placeholders = runner.placeholders()
    names = {id(placeholders[key]): name for key, name in first_names.items()}

    # What earlier rounds of pruning left in the model.
    record = Record(Constraints(), unneeded=corrections.unneeded)
    record.expanded = {
        name: (int(vars(module)[EXPANSION.dim]), int(vars(module)[EXPANSION.width]))
        for name, module in runner.modules.items()
        if EXPANSION.positions in module._buffers and runner.copies.original(name) == name
    }
    record.gathering = {name for name, module in runner.modules.items() if GATHER.positions in module._buffers}

    drawn: list[bool] = []  # modes that drew numbers
    for training in (True, False):
        recorder = Recorder(
            record.constraints,
            names,
            placeholders,
            runner.meta,
            runner.shape_cache,
            runner.data_flow(placeholders, is_recorded=True),
            corrections,
            training,
        )
        recorder.replaces_real = bool(runner.copies.tensors)
        for tensor in runner.inputs:
            recorder.table.set_labels(tensor, [None] * tensor.ndim, is_activation=True)
        hooks = LayerHooks(record, recorder, runner, {**first_names, **names}, training, corrections.checked_sizes)
        with runner.placeholders_set(placeholders, training):
            try:
                output = runner.run(recorder, hooks.before, hooks.after)
            except RuleError:
                raise
            except Exception as error:  # a forward may raise anything
                record.errors[training] = error
            else:
                hooks.finish(output)
                record.output_sources[training] = recorder.flow.sources(iter_tensors(output))
            record.operators[training] = recorder.records
            if has_drawn(record, training):
                drawn.append(training)
        record.has_guesses |= recorder.has_guesses

        # A forward that ended early has joined only some of the labels that belong together.
        if training in record.errors:
            _freeze_all(record, recorder.records, "the forward could not be followed to its end")
        if training in corrections.ends:
            number, reason = corrections.ends[training]
            _freeze_all(record, recorder.records[number:], reason)
    _drop_shared_norms(record)
    _freeze_locations(record, corrections)
    for dim, positions, reason in corrections.frozen_positions:
        size = runner.tensors[dim.tensor].shape[dim.dim]
        record.constraints.freeze(record.constraints.labels_of(dim, size)[positions], reason)
    for training in drawn:
        freeze_drawn_modules(record, runner, training)
    freeze_for_unread(record, runner)
    _freeze_whole_modules(record, runner)
    return record


def _freeze_all(record: Record, operators: Iterable[OperatorRecord], reason: str) -> None:
    """Freeze the labels of all operands and outputs of some operators."""
    for operator in operators:
        for labels in operator.all_labels:
            record.constraints.freeze(labels, reason)


def _freeze_locations(record: Record, corrections: Corrections) -> None:
    """Freeze the labels of frozen operators and of all operators that are called from the same places in the code.

    Repeated blocks run the same code: a size that is hard-coded in one of them is hard-coded in all.
    """
    reasons = {
        record.operators[index.training][index.number].location: reason
        for index, reason in corrections.frozen_operators.items()
    }
    for operators in record.operators.values() if reasons else ():
        for operator in operators:
            if operator.location in reasons:
                _freeze_all(record, [operator], reasons[operator.location])


def _drop_shared_norms(record: Record) -> None:
    """Scatter the outputs of layers that share a norm at the layers themselves.

    An expansion at the norm can serve only one layer.
    """
    norms = [norm for norm in record.expands_at_norm.values() if norm is not None]
    for layer, norm in record.expands_at_norm.items():
        if norm is not None and norms.count(norm) > 1:
            record.expands_at_norm[layer] = None


def _freeze_whole_modules(record: Record, runner: ForwardRunner) -> None:
    """Freeze all positions of the tensors of the modules that have to stay whole."""
    for module, reason in runner.whole.items():
        for name, tensor in runner.tensors.items():
            if not module or name.startswith(f"{module}."):
                for labels in record.constraints.labels_of_tensor(runner.copies.original(name), tensor.shape):
                    record.constraints.freeze(labels, reason)

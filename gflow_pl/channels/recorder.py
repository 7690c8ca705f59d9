"""Record every operator of a forward pass together with the channel labels of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from gflow_pl.channels.code_location import code_location
from gflow_pl.channels.constraints import Constraints
from gflow_pl.channels.corrections import Corrections
from gflow_pl.channels.data_flow import MAX_VALUES, DataFlow
from gflow_pl.channels.label_table import LabelTable
from gflow_pl.channels.labels import TensorInfo
from gflow_pl.channels.operator_record import Number, OperatorRecord
from gflow_pl.channels.placeholder_mode import (
    PlaceholderMode,
    cloned_output,
    collect_inputs,
    returns_alias,
)
from gflow_pl.channels.rules.creation import unknown
from gflow_pl.channels.rules.elementwise import elementwise
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.rules.registry import RULES
from gflow_pl.channels.shape_cache import ShapeCache

__all__ = ["Recorder"]


class _NeedsRealTensors(Exception):
    """The forward pass cannot be followed on meta tensors."""


class Recorder(PlaceholderMode):
    """Applies the rule of every operator to the labels of its tensors, and records the operator.

    Args:
        constraints: Where rules add constraints.
        names: id of a placeholder to the name of its parameter or buffer.
        placeholders: See `PlaceholderMode`.
        meta: See `PlaceholderMode`.
        shape_cache: See `PlaceholderMode`.
        flow: See `PlaceholderMode`.
        corrections: Corrections by earlier verifications.
        training: Whether the forward pass is in training mode.

    Attributes:
        table: The labels of all tensors of the forward pass.
        records: The records of all operators so far, in order.
        readers: id of a layer's output to the names of the modules that read it.
        has_guesses: Whether a rule had to guess what the size of a dimension follows.
        products: Names of the operators that may apply a weight.
        on_product: Called with every call of these operators.
    """

    def __init__(
        self,
        constraints: Constraints,
        names: Mapping[int, str],
        placeholders: Mapping[int, Tensor],
        meta: bool,
        shape_cache: ShapeCache,
        flow: DataFlow,
        corrections: Corrections,
        training: bool,
    ) -> None:
        super().__init__(placeholders, meta, shape_cache, flow)
        self.constraints = constraints
        self.table = LabelTable(constraints, names)
        self.records: list[OperatorRecord] = []
        self.readers: dict[int, list[str]] = {}
        self.has_guesses = False
        self.products: Container[str] = ()
        self.on_product: Callable[[OperatorCall], None] | None = None
        self._choices = corrections.choices
        self._records_locations = bool(corrections.frozen_operators)
        self._end = corrections.ends[training][0] if training in corrections.ends else None
        self._known_rules: dict[OpOverload, tuple[str, Rule | None]] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run and record one operator, or the operators that it decomposes into if it has no rule."""
        name, rule = self._rule_of(func)
        args, kwargs, inputs = self.prepare(name, args, kwargs or {})
        if rule is None:
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = self.compute(func, args, kwargs)

        # Past the end, an output whose size depends on values is kept, so that the verification can go on behind it.
        has_dynamic_size = rule in (None, unknown) or torch.Tag.dynamic_output_shape in func.tags
        is_data_dependent = has_dynamic_size and not self.meta
        kept_output = None
        is_past_end = self._end is not None and len(self.records) >= self._end
        if is_past_end and (is_data_dependent or name == "_local_scalar_dense") and not returns_alias(func):
            kept_output = cloned_output(output)

        module_name, module = self.module_stack[-1] if self.module_stack else ("", None)
        call = OperatorCall(
            name,
            args,
            kwargs,
            inputs.tensors,
            output,
            module,
            module_name,
            self.module_inputs[-1] if self.module_inputs else None,
            table=self.table,
            choices=self._choices,
        )
        self._record(call, rule or unknown, inputs.numbers)
        self.records[-1].is_data_dependent, self.records[-1].output = is_data_dependent, kept_output
        return output

    def _rule_of(self, func: OpOverload) -> tuple[str, Rule | None]:
        """Return the name and the rule of an operator; no rule if it can be decomposed instead."""
        known = self._known_rules.get(func)
        if known is None:
            name = func._schema.name.removeprefix("aten::")
            rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
            if rule is None and torch.Tag.pointwise in func.tags:
                rule = elementwise
            if rule is None and not func._can_decompose():
                rule = unknown
            known = self._known_rules[func] = (name, rule)
        return known

    def _record(self, call: OperatorCall, rule: Rule, numbers: tuple[Number, ...]) -> None:
        """Apply a rule to the call of an operator and append the record of the call."""
        # Operands.
        infos = [self.table.known(tensor) or self._info_of_unseen(tensor) for tensor in call.operands]
        for tensor in call.operands:
            if id(tensor) in self.readers:
                self.readers[id(tensor)].append(self.module_name)
        all_labels = [labels for info in infos for labels in info.labels if labels is not None]

        call.is_activation = any([info.is_activation for info in infos])
        rule(call)
        self.has_guesses |= call.is_guess
        if call.name in self.products and self.on_product is not None:
            self.on_product(call)

        # Outputs.
        outputs: list[Tensor] = []
        collect_inputs((call.output,), outputs, [])
        output_infos = [self.table.info(tensor) for tensor in outputs]
        all_labels += [labels for info in output_infos for labels in info.labels if labels is not None]
        sizes_decide = all([info.is_uniform for info in infos]) and not all([info.is_uniform for info in output_infos])

        # Of several choices, the one with the lowest priority is changed first.
        open_sites = [pair for pair in call.sites if pair[1]]
        site, choices_left = min(open_sites, key=lambda pair: pair[0].priority) if open_sites else (None, 0)
        self.records.append(
            OperatorRecord(
                name=call.name,
                numbers=numbers,
                sources=self.sources(call.name, call.operands),
                shapes=[tensor.shape for tensor in outputs],
                output_labels=[None if info.is_uniform else list(info.labels) for info in output_infos],
                all_labels=all_labels,
                module=self.module_name,
                site=site,
                choices_left=choices_left,
                expected_counts=call.expected,
                location=code_location() if self._records_locations else None,
                operand_shapes=[tensor.shape for tensor in call.operands] if infos and sizes_decide else None,
            )
        )
        self.add_results(call.name, outputs, call.operands)

    def _info_of_unseen(self, tensor: Tensor) -> TensorInfo:
        """Return what is known of an operand that no operator returned: a parameter, a buffer, or a constant.

        Raises:
            _NeedsRealTensors: A constant was created on the device of the tensors (``torch.tensor(x.shape[1],
                device=x.device)``), which is the meta device here, so its values are unknown.
        """
        is_known = id(tensor) in self.table.names or id(tensor) in self.constant_placeholders
        if self.meta and not is_known and tensor.numel() <= MAX_VALUES:
            raise _NeedsRealTensors("a tensor made of numbers, whose values meta tensors do not hold")
        return self.table.info(tensor)

"""The base of both dispatch modes of a trace: every operator of a forward pass runs on placeholders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gflow_pl.channels.data_flow import LAYOUT_DEPENDENT, MAX_VALUES, DataFlow, Sources
from gflow_pl.channels.operator_record import Number
from gflow_pl.channels.shape_cache import ShapeCache

__all__ = ["OperatorInputs", "PlaceholderMode", "cloned_output", "collect_inputs", "returns_alias"]

_META = torch.device("meta")


class OperatorInputs(NamedTuple):
    """What an operator is called with.

    Attributes:
        tensors: The tensors among its arguments.
        numbers: The plain numbers, strings and dtypes among its arguments, and the values of small tensors that hold
            constants.
    """

    tensors: list[Tensor]
    numbers: tuple[Number, ...]


class PlaceholderMode(TorchDispatchMode):
    """Runs operators on placeholders, and keeps track of the module that is running.

    On the meta device operators compute shapes only. Parameters and buffers are placeholders already; every other real
    tensor that an operator is called with (a constant of the forward) is replaced here.

    Args:
        placeholders: id of a real parameter or buffer to its placeholder.
        meta: Whether the forward runs on meta tensors.
        shape_cache: Known output shapes of operators.
        flow: Where the tensors of the pass come from.

    Attributes:
        module_stack: Names and modules whose forward is running, outermost first.
        module_inputs: The first argument of each of these modules; None if it is no tensor.
        keep_alive: Objects that are kept because dictionaries refer to them by id, which is unique only while they
            live.
        constant_placeholders: ids of the placeholders of constants.
        replaces_real: Whether tensors that no module holds may have a placeholder although the forward runs on real
            tensors.
    """

    replaces_real = False

    def __init__(self, placeholders: Mapping[int, Tensor], meta: bool, shape_cache: ShapeCache, flow: DataFlow) -> None:
        super().__init__()
        self.flow = flow
        self.placeholders = placeholders
        self.meta = meta
        self.shape_cache = shape_cache
        self.module_stack: list[tuple[str, nn.Module]] = []
        self.module_inputs: list[Tensor | None] = []
        self.keep_alive: list[object] = []
        self.constant_placeholders: set[int] = set()
        self._constants: dict[int, Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: nothing is compiled during a trace, so torch need not guard every operator against dynamo."""
        return False

    @property
    def module_name(self) -> str:
        """Name of the module whose forward is running."""
        return self.module_stack[-1][0] if self.module_stack else ""

    def placeholder_of(self, value: Tensor) -> Tensor:
        """Return the placeholder of a real tensor, or the tensor itself if it needs none."""
        if not self.meta:
            return self.placeholders.get(id(value), value)
        if value.is_meta:
            return value
        known = self.placeholders.get(id(value))
        if known is None:
            known = self._constants.get(id(value))
        if known is None:
            with _disable_current_modes():
                known = torch.empty_like(value, device="meta")
            self.keep_alive.append(value)
            self._constants[id(value)] = known
            self.constant_placeholders.add(id(known))
            self.flow.add_stand_in(known, value)
        return known

    def prepare(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], OperatorInputs]:
        """Return the arguments of an operator with placeholders for real tensors, and what is recorded of them."""
        tensors: list[Tensor] = []
        numbers: list[Number] = []
        collect_inputs(args, tensors, numbers)
        if kwargs:
            collect_inputs(kwargs.values(), tensors, numbers)
        if self.meta and not tensors and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        elif self._has_unreplaced(tensors):
            numbers += self._constant_values(tensors) if self.meta else []
            tensors = [self.placeholder_of(tensor) for tensor in tensors]
            args = tuple([_with_tensors_replaced(value, self.placeholder_of) for value in args])
            kwargs = {key: _with_tensors_replaced(value, self.placeholder_of) for key, value in kwargs.items()}
        elif name == "lift_fresh":  # a tensor literal such as torch.tensor(3)
            numbers += self._constant_values(tensors)
        return args, kwargs, OperatorInputs(tensors, tuple(numbers))

    def _has_unreplaced(self, tensors: list[Tensor]) -> bool:
        """Return whether a tensor among an operator's arguments has to be replaced by its placeholder."""
        if self.meta:
            return not all([tensor.is_meta for tensor in tensors])
        return self.replaces_real and any([id(tensor) in self.placeholders for tensor in tensors])

    def _constant_values(self, tensors: Iterable[Tensor]) -> list[Number]:
        """Return the values of small tensors that are neither placeholders nor parameters nor buffers."""
        values: list[Number] = []
        for tensor in tensors:
            if tensor.is_meta or id(tensor) in self.placeholders:
                continue
            if self.meta and tensor.device.type != "cpu":
                continue
            if tensor.numel() <= MAX_VALUES:
                with _disable_current_modes():
                    values += tensor.reshape(-1).tolist()
        return values

    def sources(self, name: str, operands: Sequence[Tensor]) -> Sources:
        """Return where the operands of an operator come from; nothing for a layout-dependent one."""
        return () if name in LAYOUT_DEPENDENT else self.flow.sources(operands, is_write=name[-1] == "_")

    def add_results(self, name: str, results: Sequence[Tensor], operands: Sequence[Tensor]) -> None:
        """Number the results of an operator for `sources`."""
        if name not in LAYOUT_DEPENDENT:
            self.flow.add_results(results, operands)
        elif operands and results:
            self.flow.add_copy(results[0], operands[0])

    def compute(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs of an operator; on the meta device from the shape cache if it can tell."""
        return self.shape_cache.compute(func, args, kwargs) if self.meta else func(*args, **kwargs)


def collect_inputs(values: Iterable[object], tensors: list[Tensor], numbers: list[Number]) -> None:
    """Append the tensors, and the plain numbers, strings and dtypes among arguments (also in lists) to two lists."""
    for value in values:
        cls = value.__class__
        if cls is int or cls is float or cls is bool:
            numbers.append(value)  # type: ignore[arg-type]
        elif value is None:
            continue
        elif isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            collect_inputs(value, tensors, numbers)
        elif isinstance(value, (int, float, complex, str, torch.dtype)):
            numbers.append(value)


def _with_tensors_replaced(value: object, replace: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, (list, tuple)):
        return [_with_tensors_replaced(item, replace) for item in value]
    return value


def cloned_output(out: object) -> Any:
    """Return an operator's outputs as clones, which later in-place writes do not change."""
    if isinstance(out, (list, tuple)):
        return [cloned_output(part) for part in out]
    return out.clone() if isinstance(out, Tensor) else out


def returns_alias(func: OpOverload) -> bool:
    """Return whether an operator returns one of its arguments or a view of it."""
    return any(part.alias_info is not None for part in func._schema.returns)

"""Rides along with a forward: every tensor carries, per dim, the nodes of its positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gflow_pl.channels.code_location import code_location
from gflow_pl.channels.constraints import Constraints, Labels
from gflow_pl.channels.label_table import LabelTable
from gflow_pl.channels.labels import ChoiceSite, DimLabels, TensorInfo
from gflow_pl.channels.rules.operator_call import OperatorCall, Rule
from gflow_pl.channels.shape_cache import Shapes

__all__ = ["Call", "Recorder", "Seen", "Watch", "copied"]

_REMEMBERED = 1024  # a tensor made from Python numbers is compared by value up to this size
_META = torch.device("meta")


@dataclass(eq=False)
class Call:
    """What is remembered of one operation, to be compared with the probe.

    Attributes:
        name: Name of the op.
        numbers: Every plain number handed to it.
        shapes: Shapes of the outputs.
        labels: DimLabels of the outputs; None where the size follows whatever it meets.
        nodes: Labels of inputs and outputs.
        site: The place in the code where a rule made a choice, and has others left.
        choices: Choices that are left at this site.
        expected: (argument position, nodes): the number there is how many of these nodes are left.
        place: The place in the code, where places were asked for.
        summed: Shapes of its tensors, where nothing but their sizes decides what comes out (a sum of ones).
        by_value: Whether the sizes of its outputs may follow the values of its inputs.
        answer: What it put out, kept where the probe is to go on with it.
    """

    name: str
    numbers: tuple[Any, ...]
    shapes: list[torch.Size]
    labels: list[DimLabels | None]
    nodes: list[Labels]
    module: str
    site: ChoiceSite | None = None
    choices: int = 0
    expected: list[tuple[int, Labels]] = field(default_factory=list)
    place: tuple[Any, ...] | None = None
    summed: list[torch.Size] | None = None
    by_value: bool = False
    answer: Any = None


class _Unreadable(Exception):
    """Something that only a forward on real tensors can tell."""


class Seen(NamedTuple):
    """The tensors among the arguments of an op, and its numbers: plain ones, and those in small tensors of numbers."""

    tensors: list[Tensor]
    numbers: tuple[Any, ...]


def _sort_out(values: Iterable[Any], tensors: list[Tensor], numbers: list[Any]) -> None:
    """The tensors and the plain numbers among arguments; ops know no other containers than lists."""
    for value in values:
        kind = value.__class__
        if kind is int or kind is float or kind is bool:
            numbers.append(value)
        elif value is None:
            continue
        elif isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            _sort_out(value, tensors, numbers)
        elif isinstance(value, (int, float, complex)):
            numbers.append(value)


def _replaced(value: Any, by: Callable[[Tensor], Tensor]) -> Any:
    """The argument with every tensor in it replaced."""
    if isinstance(value, Tensor):
        return by(value)
    if isinstance(value, (list, tuple)):
        return [_replaced(item, by) for item in value]
    return value


def copied(out: Any) -> Any:
    """What an op put out, safe from later writes."""
    if isinstance(out, (list, tuple)):
        return [copied(part) for part in out]
    return out.clone() if isinstance(out, Tensor) else out


def writes(func: Any) -> bool:
    """Whether an op puts out what it was given, or a view of it."""
    return any(part.alias_info is not None for part in func._schema.returns)


class Watch(TorchDispatchMode):
    """What recorder and probe share: stand-ins for tensors, the stack of modules, one line for every op.

    Args:
        stand_ins: id of a real parameter or buffer to the tensor that plays its part.
        meta: Whether the forward runs on meta tensors.
        shapes: What is known of the outputs of ops without contents.
    """

    def __init__(self, stand_ins: dict[int, Tensor], meta: bool, shapes: Shapes) -> None:
        super().__init__()
        self.stand_ins = stand_ins
        self.meta = meta
        self.shapes = shapes
        self.stack: list[tuple[str, nn.Module]] = []
        self.entered: list[Tensor | None] = []  # the first argument of every module on the stack
        self.alive: list[Any] = []  # ids stay unique only while the tensors live
        self.constants: dict[int, Tensor] = {}
        self.made_up: set[int] = set()  # ids of the stand-ins of constants

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled during a trace; torch need not guard every op against it."""
        return False

    def standing_in(self, value: Tensor) -> Tensor:
        """The tensor that plays the part of `value` here."""
        if not self.meta or value.is_meta:
            return value
        known = self.stand_ins.get(id(value))
        if known is None:
            known = self.constants.get(id(value))
        if known is None:
            with torch.utils._python_dispatch._disable_current_modes():
                known = torch.empty_like(value, device="meta")
            self.alive.append(value)
            self.constants[id(value)] = known
            self.made_up.add(id(known))
        return known

    def staged(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Seen]:
        """The arguments of an op with stand-ins in them, and what of them is remembered."""
        tensors: list[Tensor] = []
        numbers: list[Any] = []
        _sort_out(args, tensors, numbers)
        if kwargs:
            _sort_out(kwargs.values(), tensors, numbers)
        if self.meta and not tensors and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        elif self.meta and not all([tensor.is_meta for tensor in tensors]):
            numbers += self._contents(tensors)
            tensors = [self.standing_in(tensor) for tensor in tensors]
            args = tuple([_replaced(value, self.standing_in) for value in args])
            kwargs = {key: _replaced(value, self.standing_in) for key, value in kwargs.items()}
        elif name == "lift_fresh":
            numbers += self._contents(tensors)
        return args, kwargs, Seen(tensors, tuple(numbers))

    def _contents(self, tensors: Iterable[Tensor]) -> list[Any]:
        """The contents of small tensors that hold real numbers."""
        numbers: list[Any] = []
        for tensor in tensors:
            if tensor.is_meta or id(tensor) in self.stand_ins:
                continue
            if self.meta and tensor.device.type != "cpu":
                continue
            if tensor.numel() <= _REMEMBERED:
                with torch.utils._python_dispatch._disable_current_modes():
                    numbers += tensor.reshape(-1).tolist()
        return numbers

    def computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the op gives; without contents, the shape alone where that is known."""
        return self.shapes.computed(func, args, kwargs) if self.meta else func(*args, **kwargs)

    @property
    def module_name(self) -> str:
        """Name of the module whose forward is running."""
        return self.stack[-1][0] if self.stack else ""


class Recorder(Watch):
    """Applies the rule of every op to the labels of its tensors.

    Args:
        constraints: Where the rules write.
        rules: Op name to its rule.
        fallback: The rule of ops that compute position by position, and that of unknown ops.
        names: id of a stand-in to the name of its parameter or buffer.
        stand_ins: See `Watch`.
        meta: See `Watch`.
        shapes: See `Watch`.
        choices: Place in the code to the number of the choice to make there.
        places: Whether to note where in the code every op is.
        end: Number of the op from which on the probe goes on with what ops put out here, if their sizes follow values.
    """

    def __init__(
        self,
        constraints: Constraints,
        rules: dict[str, Rule],
        fallback: tuple[Rule, Rule],
        names: dict[int, str],
        stand_ins: dict[int, Tensor],
        meta: bool,
        shapes: Shapes,
        choices: dict[ChoiceSite, int],
        places: bool,
        end: int | None,
    ) -> None:
        super().__init__(stand_ins, meta, shapes)
        self.end = end
        self.constraints, self.rules = constraints, rules
        self.table = LabelTable(constraints, names)
        self.pointwise, self.unknown = fallback
        self.choices, self.places = choices, places
        self.calls: list[Call] = []
        self.readers: dict[int, list[str]] = {}
        self.guessed = False  # whether a rule had to suppose what a size follows
        self._found: dict[Any, tuple[str, Rule | None]] = {}

    def _first_sight(self, tensor: Tensor) -> TensorInfo:
        """What no op has put out: parameters and buffers, but also numbers that the forward put on its tensors' device.

        Raises:
            _Unreadable: Without contents, such numbers (``torch.tensor(x.shape[1], device=x.device)``) cannot be told.
        """
        known = id(tensor) in self.table.names or id(tensor) in self.made_up
        if self.meta and not known and tensor.numel() <= _REMEMBERED:
            raise _Unreadable("a tensor made of numbers, which tensors without contents do not hold")
        return self.table.info(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, rule = self._rule_of(func)
        args, kwargs, seen = self.staged(name, args, kwargs or {})
        if rule is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = self.computed(func, args, kwargs)
        decides = rule in (None, self.unknown) or torch.Tag.dynamic_output_shape in func.tags
        by_value = decides and not self.meta
        answer = None
        if self.end is not None and len(self.calls) >= self.end and (by_value or name == "_local_scalar_dense"):
            answer = None if writes(func) else copied(out)
        module_name, module = self.stack[-1] if self.stack else ("", None)
        call = OperatorCall(
            name,
            args,
            kwargs,
            seen.tensors,
            out,
            module,
            module_name,
            self.entered[-1] if self.entered else None,
            table=self.table,
            choices=self.choices,
        )
        self._record(call, rule or self.unknown, seen.numbers)
        self.calls[-1].by_value, self.calls[-1].answer = by_value, answer
        return out

    def _rule_of(self, func: Any) -> tuple[str, Rule | None]:
        """Name and rule of an op; no rule where it can be taken apart instead."""
        known = self._found.get(func)
        if known is None:
            name = func._schema.name.removeprefix("aten::")
            rule = self.rules.get(name) or self.rules.get(name.removesuffix("_"))
            if rule is None and torch.Tag.pointwise in func.tags:
                rule = self.pointwise
            if rule is None and not func._can_decompose():
                rule = self.unknown
            known = self._found[func] = (name, rule)
        return known

    def _record(self, op: OperatorCall, rule: Rule, numbers: tuple[Any, ...]) -> None:
        known = [self.table.known(tensor) or self._first_sight(tensor) for tensor in op.operands]
        for tensor in op.operands:
            if id(tensor) in self.readers:
                self.readers[id(tensor)].append(self.module_name)
        op.is_activation = any([info.is_activation for info in known])
        nodes = [vector for info in known for vector in info.labels if vector is not None]
        rule(op)
        self.guessed |= op.is_guess
        outs: list[Tensor] = []
        _sort_out((op.output,), outs, [])
        out_infos = [self.table.info(tensor) for tensor in outs]
        nodes += [vector for info in out_infos for vector in info.labels if vector is not None]
        labels: Sequence[DimLabels | None] = [None if own.is_uniform else list(own.labels) for own in out_infos]
        shapes = [tensor.shape for tensor in outs]
        summed = None
        if known and all([own.is_uniform for own in known]) and not all([own.is_uniform for own in out_infos]):
            summed = [tensor.shape for tensor in op.operands]
        open_sites = [pair for pair in op.sites if pair[1]]
        site, left = min(open_sites, key=lambda pair: pair[0][0]) if open_sites else (None, 0)
        self.calls.append(
            Call(
                op.name,
                numbers,
                shapes,
                list(labels),
                nodes,
                self.module_name,
                site,
                left,
                op.expected,
                code_location() if self.places else None,
                summed,
            )
        )

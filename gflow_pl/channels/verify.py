"""Runs the network at smaller shapes and compares every op with what the survey predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from gflow_pl.channels.constraints import Boundary, BoundaryKey, Constraints, Labels, TensorDim
from gflow_pl.channels.expansions import Expansions
from gflow_pl.channels.forward_runner import Stage
from gflow_pl.channels.grouping import Partition
from gflow_pl.channels.labels import ChoiceSite
from gflow_pl.channels.record import Survey
from gflow_pl.channels.recorder import Call, Seen, Watch, copied
from gflow_pl.values import SizeAttribute
from gflow_pl.values.module_sizes import shape_attributes

__all__ = ["Blame", "Probe"]

# of a group's units that the probe removes: different ones, so that no size is right by chance
_SHARES = (0.37, 0.29, 0.46, 0.22, 0.41, 0.33, 0.26)
# copies that come and go with the memory layout
_SILENT = frozenset(["clone", "contiguous", "detach", "alias", "_to_copy", "as_strided_"])
# whole numbers among their arguments are sizes, which the shapes of the outputs show where these move
_SIZED = frozenset(
    """view _unsafe_view reshape _reshape_alias expand repeat split split_with_sizes unsafe_split unsafe_split_with_sizes chunk
    new_zeros new_ones new_empty zeros ones empty empty_strided new_empty_strided native_layer_norm _fused_rms_norm
    native_group_norm convolution _convolution slice as_strided arange channel_shuffle native_channel_shuffle""".split()  # noqa: SIM905
)

# a shape, and behind it the number that fills it
_FILLED = frozenset(["full", "new_full"])


@dataclass(eq=False)
class Blame:
    """What the survey has to do otherwise next time.

    Attributes:
        site: Place in the code whose next choice is to be taken, or None.
        call: (training, number of the op) whose labels are to be frozen, or None.
        reason: Why they are frozen.
        ends: Whether the sizes of all that follows it depend on values, so that the labels of all the rest are to be frozen.
    """

    site: ChoiceSite | None
    call: tuple[bool, int] | None
    reason: str
    ends: bool = False


class _Mismatch(Exception):
    """An op did not come out as predicted."""


class _Watcher(Watch):
    """Counts along with the recorded ops, and stops where something differs."""

    def __init__(
        self, stage: Stage, stand_ins: dict[int, Tensor], calls: Sequence[Call], constraints: Constraints, gone: Labels
    ) -> None:
        super().__init__(stand_ins, stage.meta, stage.shapes)
        self.calls, self.constraints, self.gone = calls, constraints, gone
        self.gone_before = np.concatenate([[0], np.cumsum(gone)])
        self.left: dict[int, int] = {}  # id of labels to how many of them are left
        self.at = -1
        self.inside = False
        self.differing: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        args, kwargs, seen = self.staged(name, args, kwargs or {})
        if name not in _SILENT and self._was_taken_apart(func, name):
            with self:
                return func.decompose(*args, **kwargs)
        self.inside = True
        call = None if name in _SILENT else self._next(name)
        answered = call is not None and call.answer is not None
        out = copied(call.answer) if answered else self.computed(func, args, kwargs)  # type: ignore[union-attr]
        self.alive.append(out)
        if call is not None:
            outs = out if isinstance(out, (list, tuple)) else [out]
            self._compare(call, [x for x in outs if isinstance(x, Tensor)], seen, args)
        self.inside = False
        return out

    @property
    def failed_at(self) -> int:
        """Number of the op that failed; the next one, where an error came up between two ops."""
        following = self._following()
        return self.at if self.inside or following == len(self.calls) else following

    def _following(self) -> int:
        """Number of the next recorded op that memory layouts do not bring."""
        following = range(self.at + 1, len(self.calls))
        return next((i for i in following if self.calls[i].name not in _SILENT), len(self.calls))

    def _is_next(self, name: str) -> bool:
        at = self._following()
        return at < len(self.calls) and _plain(self.calls[at].name) == _plain(name)

    def _was_taken_apart(self, func: Any, name: str) -> bool:
        """Whether the recorder saw this op as the ones that it is made of; in inference mode ops arrive whole."""
        return not self._is_next(name) and func._can_decompose()

    def _next(self, name: str) -> Call:
        found = self._is_next(name)
        self.at = self._following()
        if not found:
            raise _Mismatch("the forward takes another path at smaller shapes")
        return self.calls[self.at]

    def _compare(self, call: Call, outs: list[Tensor], seen: Seen, args: tuple[Any, ...]) -> None:
        for out, shape, labels in zip(outs, call.shapes, call.labels, strict=True):
            if labels is None:
                continue
            for dim, (size, label) in enumerate(zip(shape, labels, strict=True)):
                left = size if label is None else self._left(label)
                if out.shape[dim] != left:
                    raise _Mismatch(f"a size that does not follow the channels ('{call.name}')")
        for position, nodes in call.expected:
            if args[position] != self._left(nodes):
                raise _Mismatch(f"a position that does not follow the channels ('{call.name}')")
        resized = call.summed is not None and call.summed != [tensor.shape for tensor in seen.tensors]
        if resized or not _are_equal(_comparable(call, call.numbers), _comparable(call, seen.numbers)):
            self.differing.append(self.at)

    def _left(self, nodes: Labels) -> int:
        """How many of them are left; the survey holds them, so that their ids are theirs."""
        whole = self.constraints.range_of(nodes)
        if whole is not None:
            return len(nodes) - int(self.gone_before[whole[1]] - self.gone_before[whole[0]])
        known = self.left.get(id(nodes))
        if known is None:
            known = self.left[id(nodes)] = len(nodes) - int(np.count_nonzero(self.gone[nodes]))
        return known


def _plain(name: str) -> str:
    """Reshaping is one thing, whether memory has to be copied or not."""
    return "view" if name in ("_unsafe_view", "_reshape_alias", "reshape") else name


def _comparable(call: Call, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of the numbers among the arguments those that no shape shows."""
    if call.name in _FILLED:
        return numbers[len(call.shapes[0]) :]
    if call.name not in _SIZED or _stands_still(call):
        return numbers
    if call.name == "convolution":
        return numbers[:-1]  # the groups follow the channels
    if call.name == "slice" and call.labels[0] is not None and call.labels[0][numbers[0] if numbers else 0] is None:
        return numbers
    return tuple(x for x in numbers if isinstance(x, float))


def _are_equal(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    """Whether these are the same numbers; what is no number is equal to itself here."""
    if ours == theirs:
        return True
    return len(ours) == len(theirs) and all(a == b or (a != a and b != b) for a, b in zip(ours, theirs, strict=True))


def _stands_still(call: Call) -> bool:
    """Whether nothing that comes out moves."""
    return all(labels is not None and all(label is None for label in labels) for labels in call.labels)


class Probe:
    """A trial removal of some units of every group.

    Args:
        stage: The model and its inputs.
        found: The survey.
        expansions: The layers that are expanded.
        parts: The units and groups to try.
    """

    def __init__(self, stage: Stage, found: Survey, expansions: Expansions, parts: Partition) -> None:
        self.stage, self.found, self.expansions, self.parts = stage, found, expansions, parts
        self.live = np.zeros(found.constraints.num_labels, dtype=bool)
        for roots in parts.unit_roots:
            if len(roots) > 1:
                self.live[roots] = True
        self.live = self.live[parts.root]
        self.differing: list[tuple[bool, int]] = []

    def shapes(self) -> Blame | None:
        """Removes units of all groups; None if every op came out as predicted.

        Where sizes had to be guessed at, one trial could be right by chance: others follow, with other numbers.
        """
        blame = self._try(exact=False)
        differing = self.differing
        for trial in (1, 2) if self.found.guessed and blame is None else ():
            blame = blame or self._try(exact=False, trial=trial)
        self.differing = differing
        return blame

    def numbers(self) -> tuple[list[tuple[Labels, str]], Blame | None]:
        """Labels whose removal changes a plain number that some op is given, beyond those known to be soft.

        Returns:
            The nodes, with the reasons; and what a later trial met that the first one did not, if it met anything.
        """
        soft: list[tuple[Labels, str]] = []
        looked_at = self.differing
        while looked_at:
            more = [pair for training, number in looked_at for pair in self._soften(training, number)]
            if not more:  # it stands before all that moves, and comes from something behind
                why = f"a number that follows the width ('{self.found.calls[looked_at[0][0]][looked_at[0][1]].name}')"
                return [*soft, (np.flatnonzero(self.live), why)], None
            soft += more
            blame = self._try(exact=True, soft=soft)
            if blame is not None:
                return soft, blame
            looked_at = self.differing
        return soft, None

    def _soften(self, training: bool, number: int) -> list[tuple[Labels, str]]:
        """The units that the op sees, or those that the nearest op before it sees."""
        calls = self.found.calls[training]
        name = calls[number].name
        for call in reversed(calls[: number + 1]):
            seen = [nodes for nodes in call.nodes if self.live[nodes].any()]
            if seen and not all(self.still[nodes].all() for nodes in seen):
                return [(nodes, f"a number that follows the width ('{name}')") for nodes in seen]
        return []

    # -- one trial ---------------------------------------------------------------------------------------------------

    def _removed(self, exact: bool, soft: Sequence[tuple[Labels, str]], trial: int) -> Labels:
        """Which nodes go in this trial; `self.still` are those that do not go for being soft.

        The first trial takes shares of every group, the second one unit of each, the third units of every other one.
        """
        root = self.parts.root
        skip = np.zeros(self.found.constraints.num_labels, dtype=bool)
        for nodes, _ in soft:
            skip[root[nodes]] = True
        gone = np.zeros(self.found.constraints.num_labels, dtype=bool)
        rng = np.random.default_rng(0)
        for i, (group, roots) in enumerate(zip(self.parts.groups, self.parts.unit_roots, strict=True)):
            share = (_SHARES[i % len(_SHARES)], 0.0, 0.6)[trial]
            num = min(max(1, round(len(roots) * share)), len(roots) - 1) if trial < 2 or rng.random() < 0.5 else 0
            rows = roots[rng.permutation(len(roots))[:num]]
            if exact and (group.inexact is not None):
                skip[roots] = True
            gone[rows[~skip[rows]]] = True
        self.still = skip[root]
        return gone[root]

    def _try(self, exact: bool, soft: Sequence[tuple[Labels, str]] = (), trial: int = 0) -> Blame | None:
        self.gone = self._removed(exact, soft, trial)
        self.differing = []
        stand_ins = self._stand_ins()
        for training, calls in self.found.calls.items():
            if training in self.found.torn:
                continue
            watcher = _Watcher(self.stage, stand_ins, calls, self.found.constraints, self.gone)
            with self.stage.set(stand_ins, training):
                self._set_attributes()
                try:
                    enter = self._enter if self.expansions.has_gathers else None
                    self.stage.run(watcher, enter, self._leave if self.expansions.boundaries else None)
                except Exception as error:
                    return self._blame(training, watcher.failed_at, error, between=not watcher.inside)
            self.differing += [(training, number) for number in watcher.differing]
        return None

    def _stand_ins(self) -> dict[int, Tensor]:
        keep: dict[str, dict[int, Labels]] = {}
        for source, start, stop in self.found.constraints.ranges():
            if isinstance(source, TensorDim) and self.gone[start:stop].any():
                keep.setdefault(source.tensor, {})[source.dim] = np.flatnonzero(~self.gone[start:stop])
        return self.stage.stand_ins(keep)

    def _set_attributes(self) -> None:
        for module in self.stage.open_modules:
            own = {**module._parameters, **module._buffers}
            if "parametrizations" in module._modules:
                own.update(module._modules["parametrizations"].named_parameters(prefix="parametrizations"))
            shapes = {name: tuple(x.shape) for name, x in own.items() if x is not None}
            for attribute, value in shape_attributes(module, shapes).items():
                if attribute in vars(module):
                    module.__dict__[attribute] = value
        for source, start, stop in self.found.constraints.ranges():
            if isinstance(source, SizeAttribute):
                size = stop - start - int(self.gone[start:stop].sum())
                _set(self.stage.modules[source.module].__dict__, source, size)

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A grouped convolution that is cut off from its input reads the channels of the groups it has left."""
        boundary = self._expanded_at(BoundaryKey(name, is_input=True))
        if boundary is None or name in self.found.gathering or not args or not isinstance(args[0], Tensor):
            return None
        with _disable_current_modes():
            left = torch.from_numpy(np.flatnonzero(~self.gone[boundary.inner])).to(args[0].device)
            return args[0].index_select(boundary.dim, left), *args[1:]

    def _expanded_at(self, key: BoundaryKey) -> Boundary | None:
        if key not in self.expansions.boundaries:
            return None
        return next((b for b in self.found.constraints.boundaries if b.key == key), None)

    def _leave(self, name: str, module: nn.Module, output: Any) -> Any:
        """Behind a cut everything sees the old width; an expansion that is there already does so by itself."""
        boundary = self._expanded_at(BoundaryKey(name))
        if boundary is None or name in self.found.expanded or not isinstance(output, Tensor):
            return None
        shape = list(output.shape)
        shape[boundary.dim] = len(boundary.inner)
        with _disable_current_modes():
            full = torch.zeros(shape, dtype=output.dtype, device=output.device)
            if not self.stage.meta:
                left = torch.from_numpy(np.flatnonzero(~self.gone[boundary.inner])).to(output.device)
                full.index_copy_(boundary.dim, left, output)
        return full

    # -- blame ---------------------------------------------------------------------------------------------------------

    def _blame(self, training: bool, number: int, error: Exception, between: bool) -> Blame:
        """The nearest choice before the op that has an alternative, else the nearest op with units that move.

        An error between two ops is the module's own (it looked at sizes): then its next choice is tried first.
        """
        calls = self.found.calls[training]
        number = min(max(number, 0), len(calls) - 1)
        reason = str(error) if isinstance(error, _Mismatch) else "a size that does not follow the channels"
        here = calls[number]
        answered = any(call.answer is not None for call in calls)
        if here.by_value and isinstance(error, _Mismatch) and not between and not answered:
            return Blame(None, (training, number), f"behind '{here.name}', whose values decide on sizes", ends=True)
        for call in calls[number:] if between else [here]:
            if call.module != here.module:
                break
            if call.site is not None and call.choices > 0:
                return Blame(call.site, None, reason)
        moving = [nodes[self.live[nodes]] for nodes in calls[number].nodes]
        targets = np.unique(self.parts.root[np.concatenate([np.zeros(0, np.int64), *moving])])
        for i in range(number, -1, -1):
            call = calls[i]
            if call.site is None or call.choices <= 0:
                continue
            mine = [self.parts.root[nodes[self.live[nodes]]] for nodes in call.nodes]
            mine = [roots for roots in mine if len(roots)]
            if mine and (not len(targets) or np.isin(np.concatenate(mine), targets).any()):
                return Blame(call.site, None, reason)
        for i in range(number, -1, -1):
            if any(self.live[nodes].any() for nodes in calls[i].nodes):
                return Blame(None, (training, i), reason)
        for i in range(number, len(calls)):
            if any(self.live[nodes].any() for nodes in calls[i].nodes):
                return Blame(None, (training, i), reason)
        return Blame(None, (training, number), reason)


def _set(attributes: dict[str, Any], attribute: SizeAttribute, value: int) -> None:
    if attribute.element is None:
        attributes[attribute.name] = value
        return
    present = attributes[attribute.name]
    parts = list(present)
    parts[attribute.element] = value
    attributes[attribute.name] = tuple(parts) if type(present) is tuple else parts

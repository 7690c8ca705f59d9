"""Find the copies of a network that its module holds: teachers, targets, averaged weights, starting points."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gflow_pl.callbacks.lightning.code_mentions import hands_weights_on
from gflow_pl.callbacks.lightning.tensor_copies import TensorCopies, find_tensor_copies, grafted
from gflow_pl.channels import NetworkCopies
from gflow_pl.common.held_objects import held_objects
from gflow_pl.common.lightning_package import pl

__all__ = ["CopyWatch", "FoundCopies", "Training", "frozen_outside"]

_EXCLUDED = frozenset(vars(pl.LightningModule()))


@dataclass(frozen=True, eq=False)
class Training:
    """What is known of the training of a module's parameters.

    Attributes:
        trained: Names of the parameters that an optimizer trains.
        held: Names of the parameters that an optimizer holds, trained or not.
        changed: Names of the parameters that the training step changes by itself.
    """

    trained: Collection[str] = ()
    held: Collection[str] = ()
    changed: Collection[str] = ()


@dataclass(frozen=True, eq=False)
class FoundCopies:
    """The copies in a module.

    Attributes:
        modules: Name of a submodule to the name of the submodule that it copies.
        hidden: Modules that are no submodules, each with the name of the submodule that it copies.
        tensors: Dicts and lists of tensors that copy parameters.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    hidden: Sequence[tuple[nn.Module, str]] = ()
    tensors: Sequence[TensorCopies] = ()

    def for_trace(self) -> NetworkCopies:
        """Return the copies as a trace takes them."""
        pairs = [(tensor, name) for copies in self.tensors for name, tensor in copies.items()]
        return NetworkCopies(self.modules, self.hidden, pairs)

    def for_rewrite(self, module: nn.Module) -> list[nn.Module | TensorCopies]:
        """Return the copies that are no submodules as a rewrite takes them."""
        return [*(grafted(module, hidden, source) for hidden, source in self.hidden), *self.tensors]


class CopyWatch:
    """Finds the copies of parts of a module that are updated from these parts, or that declare themselves.

    A submodule, or a module that a list or an object holds, is taken for a copy of a submodule if it has the same
    tensors by name and shape, if no optimizer trains it, and if its weights have changed nevertheless; or if they are
    equal to those of the submodule, and a method of the module's class hands them on (`code_mentions`). A network that
    is only called, such as a frozen teacher, is no copy. Dicts of tensors by parameter name, and lists of tensors in
    the order of the parameters, are copies in any case, as is what the module's method `tensors_by_name` returns.

    Args:
        module: The module, before training begins.
        ignore: Names of modules, or prefixes up to a dot, that stay whole and so are no copies.

    Attributes:
        known: Path to a copy, found so far, to the name of the submodule that it copies.
    """

    def __init__(self, module: pl.LightningModule, ignore: Iterable[str] = ()) -> None:
        self._before, self._ignore = _checksums(module), tuple(ignore)
        self.known: dict[str, str] = {}

    def find(self, module: pl.LightningModule, training: Training | None = None) -> FoundCopies:
        """Return the copies, those included that were found by an earlier call.

        Args:
            module: The module.
            training: What is known of the training of its parameters; None if submodules are not searched.
        """
        search = _Search(module, training or Training(), self._changed(module), self._ignore)
        declare = getattr(module, "tensors_by_name", None)
        declared: Mapping[str, Tensor] = declare() if callable(declare) else {}
        modules, rest = search.declared_modules(declared)
        modules |= {path: source for path, source in self.known.items() if search.still_fits(path, source)}
        if training is not None:
            modules = search.modules(modules)
        held = held_objects(module, exclude=_EXCLUDED)
        sources = {
            path: self.known.get(path, search.source_of_hidden(path, network, modules))
            for path, network in held.modules.items()
            if not _is_inside(path, self._ignore)
        }
        hidden = {path: source for path, source in sources.items() if source is not None}
        self.known |= {**modules, **hidden}
        tensors = find_tensor_copies(module, held.containers, known=modules)
        tensors += [TensorCopies(rest)] if rest else []
        return FoundCopies(modules, [(held.modules[path], source) for path, source in hidden.items()], tensors)

    def _changed(self, module: pl.LightningModule) -> set[int]:
        """Return the ids of the parameters whose values are not those of the beginning."""
        now = _checksums(module)
        return {key for key, value in now.items() if key in self._before and self._before[key] != value}


def _checksums(module: pl.LightningModule) -> dict[int, tuple[float, ...]]:
    """Return a checksum of every parameter, by its id."""
    hidden = held_objects(module, exclude=_EXCLUDED).modules.values()
    parameters = [p for network in (module, *hidden) for p in network.parameters()]
    parameters = [p for p in parameters if not is_lazy(p) and not p.is_meta and p.numel() and p.layout == torch.strided]
    if not parameters:
        return {}
    with torch.no_grad():
        values = [p.detach().double() for p in parameters]
        sums = torch.stack([torch.stack([v.sum(), v.square().sum(), v.reshape(-1)[0]]).cpu() for v in values])
    return {id(p): tuple(row) for p, row in zip(parameters, sums.tolist(), strict=True)}


class _Search:
    """The search for modules that copy others."""

    def __init__(
        self, module: pl.LightningModule, training: Training, changed: Collection[int], ignore: tuple[str, ...]
    ) -> None:
        self._module, self._training, self._changed, self._ignore = module, training, changed, ignore
        self._named = dict(module.named_modules())
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._by_signature: dict[tuple[tuple[str, torch.Size], ...], list[str]] = {}
        for name, part in self._named.items():
            signature = _signature(part)
            if signature and name:
                self._by_signature.setdefault(signature, []).append(name)

    def declared_modules(self, declared: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Return the declared copies that are submodules, and the declared tensors that belong to none."""
        modules, rest = {}, {}
        registered = {
            id(tensor): name for name, tensor in (*self._module.named_parameters(), *self._module.named_buffers())
        }
        for source, tensor in declared.items():
            if id(tensor) not in registered:
                rest[source] = tensor
                continue
            own, other = registered[id(tensor)].split("."), source.split(".")
            while len(own) > 1 and len(other) > 1 and own[-1] == other[-1]:
                own, other = own[:-1], other[:-1]
            modules[".".join(own)] = ".".join(other)
        return modules, rest

    def modules(self, known: Mapping[str, str]) -> dict[str, str]:
        """Return the submodules that copy another one, the outermost ones only."""
        found = dict(known)
        for name, part in self._named.items():  # outer modules come first
            if not name or _is_inside(name, (*found, *self._ignore)):
                continue
            peers = [other for other in self._by_signature.get(_signature(part), ()) if other != name]
            sources = [other for other in peers if self._may_copy(name, other, found)]
            if sources and not any(p.requires_grad and self._is_trained(p) for p in part.parameters()):
                source = self._evident_source(part, name, sources)
                if source is not None:
                    found[name] = source
        return found

    def source_of_hidden(self, path: str, network: nn.Module, copies: Mapping[str, str]) -> str | None:
        """Return the name of the submodule that a hidden module copies; None if it copies none."""
        if _signature(network) == _signature(self._module):
            return ""
        sources = self._by_signature.get(_signature(network), [])
        return self._evident_source(network, path, [name for name in sources if not _is_inside(name, copies)])

    def _may_copy(self, name: str, source: str, found: Mapping[str, str]) -> bool:
        """Return whether a module may be a copy of another one, and not the other way round."""
        if _is_inside(source, (*found, name)) or _is_inside(name, (source,)):
            return False
        mine, other = self._named[name], self._named[source]
        if {id(p) for p in mine.parameters()} & {id(p) for p in other.parameters()}:
            return False
        return self._rank(mine) < self._rank(other) or (
            self._rank(mine) == self._rank(other) and self._is_later(name, source)
        )

    def _rank(self, part: nn.Module) -> tuple[bool, bool, bool]:
        parameters = list(part.parameters())
        return (
            any(self._is_trained(p) for p in parameters),
            any(self._names.get(id(p)) in self._training.held for p in parameters),
            any(p.requires_grad for p in parameters),
        )

    def _is_trained(self, parameter: Tensor) -> bool:
        return self._names.get(id(parameter)) in self._training.trained

    def _is_changed(self, parameter: Tensor) -> bool:
        return id(parameter) in self._changed or self._names.get(id(parameter)) in self._training.changed

    def still_fits(self, path: str, source: str) -> bool:
        """Return whether a path is the name of a submodule that has the shape of another one."""
        is_registered = path in self._named and source in self._named
        return is_registered and _signature(self._named[path]) == _signature(self._named[source])

    def _is_later(self, name: str, source: str) -> bool:
        order = list(self._named)
        return order.index(name) > order.index(source)

    def _evident_source(self, part: nn.Module, path: str, sources: list[str]) -> str | None:
        """Return the source with the nearest weights, if there is evidence that the part is updated from it."""
        if not sources:
            return None
        distances = {source: _distance(part, self._named[source]) for source in sources}
        nearest = min(sources, key=distances.__getitem__)
        moved = any(
            id(p) in self._changed or self._names.get(id(p)) in self._training.changed for p in part.parameters()
        )
        is_equal = distances[nearest] == 0.0
        if moved or (is_equal and hands_weights_on(self._module, path.partition(".")[0])):
            return nearest
        return None


def _signature(part: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    """Return names and shapes of a module's tensors; nothing if no weight of a layer is among them."""
    parameters = [(name, p.shape) for name, p in part.named_parameters()]
    if not any(len(shape) > 1 for _, shape in parameters):
        return ()
    return (*parameters, *((name, b.shape) for name, b in part.named_buffers()))


def _distance(part: nn.Module, other: nn.Module) -> float:
    """Return the squared distance of the parameters of two modules of one shape."""
    with torch.no_grad():
        pairs = zip(part.parameters(), other.parameters(), strict=True)
        squares = [(a.detach().double() - b.detach().to(a.device).double()).square().sum() for a, b in pairs]
    return float(torch.stack([square.cpu() for square in squares]).sum())


def _is_inside(name: str, prefixes: Iterable[str]) -> bool:
    """Return whether a name is one of these, or that of something inside of one of these."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def frozen_outside(
    module: pl.LightningModule,
    training: Training,
    forward: Collection[str],
    step: Collection[str],
    copies: Mapping[str, str],
) -> Iterator[str]:
    """Yield the names of modules with parameters that training leaves alone, and that `forward` does not run.

    Args:
        module: The module.
        training: What is known of the training.
        forward: Names of the modules that `forward` runs.
        step: Names of the modules that the training step runs.
        copies: Copies, which are left out.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    for name, part in module.named_modules():
        own = list(part.parameters(recurse=False))
        if not own or not name or name in forward or _is_inside(name, copies):
            continue
        is_trained = any(p.requires_grad and names.get(id(p)) in training.trained for p in own)
        if not any(p.requires_grad for p in own) or (name in step and not is_trained):
            yield name

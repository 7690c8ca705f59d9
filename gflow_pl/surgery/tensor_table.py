"""Parameters and buffers of a network by name, with every module that holds them; cutting and resizing one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gflow_pl.values.expansion_names import is_index_buffer

__all__ = ["Cut", "Entry", "Place", "TensorTable", "cut_tensor", "empty_like_format"]

Place = tuple[nn.Module, str]
"""A module and the local name of a parameter or buffer in it."""

_LARGE = 1_000_000
"""Number of elements from which on a cut along two dims is faster in one indexing operation."""


@dataclass(frozen=True, eq=False)
class Cut:
    """The positions along one dim of a tensor that stay.

    Attributes:
        dim: The dim.
        kept: (positions that stay,) int64, ascending.
    """

    dim: int
    kept: Tensor


@dataclass(eq=False)
class Entry:
    """One parameter or buffer, and every place in the network that holds it (several for a tied tensor).

    Attributes:
        name: Full name at its first place, as in ``named_parameters()``.
        tensor: The tensor.
        is_parameter: Whether it is a parameter.
        persistent: Whether it is part of the state dict.
        places: The places that hold it.
    """

    name: str
    tensor: Tensor
    is_parameter: bool
    persistent: bool
    places: list[Place] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Replace the contents and the shape of the tensor at all its places. A parameter stays the same object."""
        if self.is_parameter:
            # set_, not .data: the latter leaves the old shape in live autograd graphs and in the reducer of DDP.
            self.tensor.set_(value)  # type: ignore[call-overload]
        else:
            for module, leaf in self.places:
                module._buffers[leaf] = value
            self.tensor = value


class TensorTable(Mapping[str, Entry]):
    """Every parameter and buffer of a network by name. A tied tensor occurs once, under its first name.

    Uninitialized (lazy) tensors and the index buffers of expansions are left out.

    Attributes:
        modules: Every module by name. A module that is registered twice occurs under both names.
        aliases: Every name of a tensor, mapped to its first name.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._entries: dict[str, Entry] = {}
        self.aliases: dict[str, str] = {}
        self.modules: dict[str, nn.Module] = {}
        _collect_modules(model, "", self.modules)
        by_identity: dict[int, Entry] = {}
        for prefix, module in self.modules.items():
            for leaf, tensor, is_parameter in _own_tensors(module):
                name = f"{prefix}.{leaf}" if prefix else leaf
                entry = by_identity.get(id(tensor))
                if entry is None:
                    persistent = is_parameter or leaf not in module._non_persistent_buffers_set
                    entry = Entry(name, tensor, is_parameter, persistent)
                    by_identity[id(tensor)] = self._entries[name] = entry
                self.aliases[name] = entry.name
                if (module, leaf) not in entry.places:
                    entry.places.append((module, leaf))

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _collect_modules(module: nn.Module, name: str, found: dict[str, nn.Module]) -> None:
    """Add a module and all modules in it to `found`, by full name.

    The result is that of ``named_modules(remove_duplicate=False)``, whose nested generators take longer than the rest
    of a rewrite.
    """
    found[name] = module
    for leaf, child in module._modules.items():
        if child is not None:
            _collect_modules(child, f"{name}.{leaf}" if name else leaf, found)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield local name, tensor and whether it is a parameter, for all tensors of a module without its children."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None and not is_lazy(parameter):
            yield leaf, parameter, True
    for leaf, buffer in module._buffers.items():
        if buffer is not None and not is_index_buffer(leaf) and not is_lazy(buffer):
            yield leaf, buffer, False


def empty_like_format(old: Tensor, shape: Iterable[int]) -> Tensor:
    """Return an uninitialized tensor of another shape with the dtype, device and memory format of a tensor.

    Args:
        old: The tensor.
        shape: The new shape, with as many dims as the old one.
    """
    return torch.empty(tuple(shape), dtype=old.dtype, device=old.device, memory_format=_memory_format(old))


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Return channels-last only for a tensor that is not contiguous as well."""
    # Compare strides instead of is_contiguous: a 1x1 kernel is contiguous in both formats.
    for ndim, channels_last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == ndim and not _has_strides_of(tensor, torch.contiguous_format):
            return channels_last if _has_strides_of(tensor, channels_last) else torch.contiguous_format
    return torch.contiguous_format


def _has_strides_of(tensor: Tensor, memory_format: torch.memory_format) -> bool:
    """Return whether a tensor has the strides of a new tensor of its shape in a memory format."""
    return tensor.stride() == torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()


def cut_tensor(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """Return a new tensor with the kept positions only. Dtype, device and memory format stay.

    Args:
        tensor: A tensor of any shape.
        cuts: The positions that stay, at most one entry for each dim. Other dims keep all positions.
    """
    value, kept = tensor.detach(), {cut.dim: cut.kept.to(tensor.device) for cut in cuts}
    if kept.keys() == {0, 1} and value.numel() > _LARGE:
        value = value[kept[0][:, None], kept[1]]  # in one step: an intermediate copy would double the time
    else:
        for dim in sorted(kept):  # dim 0 first: whole rows are copied fastest and leave less to select from
            value = value.index_select(dim, kept[dim])
    if value.ndim < 4 or value.stride() == tensor.stride():
        return value
    return empty_like_format(tensor, value.shape).copy_(value)

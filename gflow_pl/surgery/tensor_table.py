"""The tensors of a network by name, with every place that holds them, and how one is cut or resized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gflow_pl.values.expansion_names import is_index_buffer

__all__ = ["Cut", "Owned", "TensorTable", "cut_tensor", "empty_like_format"]

_LARGE = 1_000_000  # elements


@dataclass(frozen=True, eq=False)
class Cut:
    """The positions along one dim that stay, ascending."""

    dim: int
    kept: Tensor


@dataclass(eq=False)
class Owned:
    """One parameter or buffer, and every place in the network that holds it.

    Attributes:
        name: Full name in its first place, as in ``named_parameters()``.
        tensor: The tensor.
        is_parameter: Whether it is a parameter.
        persistent: Whether a state dict has it.
        places: The modules that hold it, each with its local name there.
    """

    name: str
    tensor: Tensor
    is_parameter: bool
    persistent: bool
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Gives the tensor another content and shape; a parameter stays the same object."""
        if self.is_parameter:
            # set_, not .data: the latter leaves the old shape in live graphs and in DDP's reducer.
            self.tensor.set_(value)  # type: ignore[call-overload]
        else:
            for module, leaf in self.places:
                module._buffers[leaf] = value
            self.tensor = value


class TensorTable(Mapping[str, Owned]):
    """Every parameter and buffer of a network by name; a tied tensor once, under its first name.

    Left out are uninitialised (lazy) ones and the indices of expansions.

    Attributes:
        modules: Every module by name; one that stands in two places under both names.
        aliases: Every name of a tensor to its first name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._entries: dict[str, Owned] = {}
        self.aliases: dict[str, str] = {}
        self.modules: dict[str, nn.Module] = {}
        _walk(model, "", self.modules)
        seen: dict[int, Owned] = {}
        for prefix, module in self.modules.items():
            for leaf, tensor, is_parameter in _own_tensors(module):
                name = f"{prefix}.{leaf}" if prefix else leaf
                entry = seen.get(id(tensor))
                if entry is None:
                    persistent = is_parameter or leaf not in module._non_persistent_buffers_set
                    entry = seen[id(tensor)] = self._entries[name] = Owned(name, tensor, is_parameter, persistent)
                self.aliases[name] = entry.name
                if (module, leaf) not in entry.places:
                    entry.places.append((module, leaf))

    def __getitem__(self, name: str) -> Owned:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _walk(module: nn.Module, name: str, found: dict[str, nn.Module]) -> None:
    """What ``named_modules(remove_duplicate=False)`` lists; its nested generators cost more than the whole surgery."""
    found[name] = module
    for leaf, child in module._modules.items():
        if child is not None:
            _walk(child, f"{name}.{leaf}" if name else leaf, found)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for leaf, parameter in module._parameters.items():
        if parameter is not None and not is_lazy(parameter):
            yield leaf, parameter, True
    for leaf, buffer in module._buffers.items():
        if buffer is not None and not is_index_buffer(leaf) and not is_lazy(buffer):
            yield leaf, buffer, False


def empty_like_format(old: Tensor, shape: Iterable[int]) -> Tensor:
    """An empty tensor of another shape (of as many dims), with the old one's dtype, device and memory format."""
    return torch.empty(tuple(shape), dtype=old.dtype, device=old.device, memory_format=_memory_format(old))


def _memory_format(tensor: Tensor) -> torch.memory_format:
    # Strides, not is_contiguous: a 1x1 kernel is contiguous in both ways at once.
    for ndim, channels_last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == ndim and not _has_strides_of(tensor, torch.contiguous_format):
            return channels_last if _has_strides_of(tensor, channels_last) else torch.contiguous_format
    return torch.contiguous_format


def _has_strides_of(tensor: Tensor, memory_format: torch.memory_format) -> bool:
    return tensor.stride() == torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()


def cut_tensor(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """A new tensor with the kept positions only; dtype, device and memory format stay.

    Args:
        tensor: Any shape.
        cuts: Dims and the positions along them that stay.
    """
    value, kept = tensor.detach(), {cut.dim: cut.kept.to(tensor.device) for cut in cuts}
    if kept.keys() == {0, 1} and value.numel() > _LARGE:
        value = value[kept[0][:, None], kept[1]]  # at once: a copy cut along one dim only would take as long again
    else:
        for dim in sorted(kept):  # whole rows first: they are copied fastest, and leave less to pick from
            value = value.index_select(dim, kept[dim])
    if value.ndim < 4 or value.stride() == tensor.stride():
        return value
    return empty_like_format(tensor, value.shape).copy_(value)

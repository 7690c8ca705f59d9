"""Plain modules that scatter, gather and return zeros: what a finalized network contains instead of hooks.

All of them work on any device, and with `torch.jit.script`, `torch.fx` and `torch.export`.
"""

# Annotations are not postponed in this file: TorchScript reads them as objects.

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, List, Optional  # noqa: UP035 (TorchScript reads these annotations)

import torch
from torch import Tensor, nn
from typing_extensions import override

from gflow_pl.surgery.emptied import zeros_of_layer

__all__ = ["EmptyLayer", "Gather", "Placed", "PlacedCall", "PlacedTranspose", "Scatter", "scatter"]


@torch.fx.wrap
def scatter(output: Tensor, positions: Tensor, dim: int, width: int) -> Tensor:
    """Scatter channels to their positions among zeros of the full width.

    Args:
        output: Tensor with the kept channels only.
        positions: (channels,) int64: position of each channel at the full width.
        dim: Channel dim.
        width: Full width.

    Returns:
        Tensor with all channels, in the memory format of `output`.
    """
    shape = list(output.shape)
    shape[dim] = width
    zeros = output.new_zeros(shape)
    # Not is_contiguous(memory_format=...), which vmap refuses.
    if output.ndim == 4 and not output.is_contiguous() and output.permute(0, 2, 3, 1).is_contiguous():
        zeros = zeros.to(memory_format=torch.channels_last)
    if positions.numel() == 0:
        return zeros
    return zeros.index_copy_(dim, positions, output)


@torch.fx.wrap
def _zero_maps(
    input: Tensor,
    up: List[int],  # noqa: UP006
    gain: List[int],  # noqa: UP006
    down: List[int],  # noqa: UP006
    output_size: Optional[List[int]] = None,  # noqa: UP006, UP045
) -> Tensor:
    """Return zeros with one channel in the spatial size of a convolution's output; see `emptied`."""
    first = input.ndim - len(gain)
    shape = list(input.shape)
    shape[first - 1] = 1
    for i in range(len(gain)):
        shape[first + i] = ((shape[first + i] - 1) * up[i] + gain[i]) // down[i] + 1
        if output_size is not None:
            shape[first + i] = output_size[len(output_size) - len(gain) + i]
    return _zeros(input, shape)


@torch.fx.wrap
def _zero_rows(input: Tensor) -> Tensor:
    """Return zeros with one feature."""
    shape = list(input.shape)
    shape[-1] = 1
    return _zeros(input, shape)


def _zeros(input: Tensor, shape: List[int]) -> Tensor:  # noqa: UP006
    """Return zeros in the dtype that a layer would compute; a scripted one does not read autocast."""
    if not torch.jit.is_scripting():
        return zeros_of_layer(input, shape)
    return input.new_zeros(shape)


class _Placement(nn.Module):
    """Base of `Scatter` and `Gather`.

    Attributes:
        positions: (channels,) int64: position of each channel at the full width; a buffer of the state dict.
        dim: Channel dim.
        width: Full width.
    """

    positions: Tensor

    def __init__(self, dim: int, width: int, positions: Tensor) -> None:
        super().__init__()
        self.dim, self.width = dim, width
        self.register_buffer("positions", positions)

    @override
    def extra_repr(self) -> str:
        return f"dim={self.dim}, width={self.width}, channels={len(self.positions)}"


class Scatter(_Placement):
    """Scatter the input's channels to their positions among zeros of the full width."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with all channels, in its memory format."""
        return scatter(input, self.positions, self.dim, self.width)


class Gather(_Placement):
    """Select the channels at some positions of the full width."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the selected channels."""
        return input.index_select(self.dim, self.positions)


class EmptyLayer(nn.Module):
    """A convolution or linear layer without filters: it returns zeros with one channel.

    Attributes:
        up: Factor on each spatial length of the input; empty for a linear layer. See `emptied`.
        gain: Added to each length.
        down: Divisor of each length.
    """

    up: List[int]  # noqa: UP006
    gain: List[int]  # noqa: UP006
    down: List[int]  # noqa: UP006

    def __init__(self, up: Sequence[int] = (), gain: Sequence[int] = (), down: Sequence[int] = ()) -> None:
        super().__init__()
        self.up = list(up)
        self.gain = list(gain)
        self.down = list(down)
        self.is_linear = not gain

    def forward(self, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:  # noqa: UP006, UP045
        """Return zeros in the shape of the layer's output, with one channel."""
        if self.is_linear:
            return _zero_rows(input)
        return _zero_maps(input, self.up, self.gain, self.down, output_size)


class _AttributesOfLayer(nn.Module):
    """Read and assign attributes that belong to the child ``layer``, so that ``norm.weight`` goes on working."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("_modules", {}).get("layer")
            if layer is None or name.startswith("_"):
                raise
            return getattr(layer, name)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        layer = self.__dict__.get("_modules", {}).get("layer")
        if layer is not None and (name in layer._parameters or name in layer._buffers):
            setattr(layer, name, value)
        else:
            super().__setattr__(name, value)


class Placed(_AttributesOfLayer, nn.Sequential):
    """A layer or norm with one input, behind a `Gather` and before a `Scatter`, each of which may be missing."""

    def __init__(self, layer: nn.Module, gather: Gather | None, scatter: Scatter | None) -> None:
        parts = (("gather", gather), ("layer", layer), ("scatter", scatter))
        super().__init__(OrderedDict((name, part) for name, part in parts if part is not None))


class PlacedTranspose(_AttributesOfLayer):
    """A transposed convolution, behind a `Gather` and before a `Scatter`, or an identity instead."""

    def __init__(self, layer: nn.Module, gather: Gather | None, scatter: Scatter | None) -> None:
        super().__init__()
        self.gather = nn.Identity() if gather is None else gather
        self.layer = layer
        self.scatter = nn.Identity() if scatter is None else scatter

    def forward(self, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:  # noqa: UP006, UP045
        """Return the layer's output with all channels."""
        return self.scatter(self.layer(self.gather(input), output_size))


class PlacedCall(_AttributesOfLayer):
    """A module with any arguments, behind a `Gather` and before a `Scatter`, or an identity instead."""

    def __init__(self, layer: nn.Module, gather: Gather | None, scatter: Scatter | None) -> None:
        super().__init__()
        self.gather = nn.Identity() if gather is None else gather
        self.layer = layer
        self.scatter = nn.Identity() if scatter is None else scatter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with all channels."""
        if args:
            args = (self.gather(args[0]), *args[1:])
        return self.scatter(self.layer(*args, **kwargs))

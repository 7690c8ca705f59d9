"""Layers that lost all of their filters: their forward is replaced by one that returns zeros.

torch cannot run a convolution without filters. The module gets a replacement ``forward`` as an attribute of the
instance: a partial function of plain numbers, which is copied, pickled and exported with the module. It returns zeros
with one channel instead of none, because pooling and resizing need at least one; the expansion behind the last module
of the branch makes them as wide as the stream.

The replacement functions are pickled by name with the module they belong to: they must keep their names and stay in
this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["has_replaced_forward", "output_width", "update_emptiness", "zeros_of_layer"]

_FROZEN = "_gflow_was_trained"
"""Attribute with the names of the parameters that ``requires_grad`` was turned off for."""

_WIDTHS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (_ConvNd, "out_channels"),
    (nn.Linear, "out_features"),
    (_NormBase, "num_features"),
    (nn.GroupNorm, "num_channels"),
    ((nn.LayerNorm, nn.RMSNorm), "normalized_shape"),
    (nn.PReLU, "num_parameters"),
)
"""Types of modules with the attribute that is the number of their output channels."""


def output_width(module: nn.Module) -> int | None:
    """Return the number of output channels of a layer or norm, or None for any other module."""
    for types, name in _WIDTHS:
        if isinstance(module, types):
            width = getattr(module, name)
            return width[-1] if isinstance(width, tuple) else width
    return None


def update_emptiness(module: nn.Module, *, network_has_emptied_layers: bool = True) -> None:
    """Replace the forward of a module without output channels and freeze its parameters.

    Undo both if it has channels again.

    Args:
        module: Any module.
        network_has_emptied_layers: Whether pruning has emptied layers of the network. If not, a layer without outputs
            was built like that and stays as it is.
    """
    if network_has_emptied_layers and output_width(module) == 0:
        module.__dict__["forward"] = _replacement_forward(module)
        trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if trained:
            module.__dict__[_FROZEN] = trained
        for name in trained:
            module.get_parameter(name).requires_grad_(False)
    elif has_replaced_forward(module):
        del module.__dict__["forward"]
        for name in module.__dict__.pop(_FROZEN, []):
            module.get_parameter(name).requires_grad_(True)


def has_replaced_forward(module: nn.Module) -> bool:
    """Return whether the forward of a module is replaced because the module has no output channels."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func in _REPLACEMENTS


def _replacement_forward(module: nn.Module) -> partial[Tensor]:
    """Return the replacement for the forward of a module without output channels.

    For a convolution, the output length n' along a spatial dim follows from the input length n as
    ((n - 1) * up + gain) // down + 1, where up, gain and down follow from stride, padding, dilation and kernel size.
    """
    if isinstance(module, nn.Linear):
        return partial(_no_rows)
    if not isinstance(module, _ConvNd):
        return partial(_pass_on)
    transposed = isinstance(module, _ConvTransposeNd)
    # Padding on both sides minus what the kernel covers beyond one position.
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    pads = [2 * pad for pad in module.padding if not isinstance(pad, str)]
    if isinstance(module.padding, str):
        pads = spans if module.padding == "same" else [0] * len(spans)
    gains = tuple(pad - span for pad, span in zip(pads, spans, strict=True))
    if transposed:
        gains = tuple(extra - gain for extra, gain in zip(module.output_padding, gains, strict=True))
    # A convolution divides by its stride, a transposed one multiplies by it.
    ones = (1,) * len(gains)
    up, down = (tuple(module.stride), ones) if transposed else (ones, tuple(module.stride))
    return partial(_no_maps, up=up, gain=gains, down=down)


# The replacements name their arguments like the layers do, for calls with keywords.


def _no_maps(
    input: Tensor,
    output_size: Sequence[int] | None = None,
    *,
    up: tuple[int, ...],
    gain: tuple[int, ...],
    down: tuple[int, ...],
) -> Tensor:
    """Return the output of a convolution without filters: zeros with one channel, in the spatial size of its output.

    Args:
        input: (batch, channels, *sizes), or without batch.
        output_size: Spatial size of the output, as in the forward of a transposed convolution.
        up: Factor on each length; see `_replacement_forward`.
        gain: Added to each length.
        down: Divisor of each length.
    """
    first = input.ndim - len(gain)
    lengths = input.shape[first:]
    sizes = [((n - 1) * u + g) // d + 1 for n, u, g, d in zip(lengths, up, gain, down, strict=True)]
    sizes = sizes if output_size is None else list(output_size)[-len(gain) :]
    return zeros_of_layer(input, [*input.shape[: first - 1], 1, *sizes])


def _no_rows(input: Tensor) -> Tensor:
    """Return the output of a linear layer without output features: zeros with one feature.

    Args:
        input: (..., features).
    """
    return zeros_of_layer(input, [*input.shape[:-1], 1])


def _pass_on(input: Tensor) -> Tensor:
    """Return the input: a norm or PReLU behind an emptied layer receives zeros and returns them."""
    return input


_REPLACEMENTS = (_no_maps, _no_rows, _pass_on)


def zeros_of_layer(x: Tensor, shape: list[int]) -> Tensor:
    """Return zeros in the dtype that a layer would compute from `x`, under autocast as well."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    # Not one zero expanded to the shape: an in-place activation may follow.
    return x.new_zeros(shape, dtype=dtype)

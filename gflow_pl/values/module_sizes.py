"""The rules from the shapes of a module's tensors to its attributes, such as ``out_channels``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gflow_pl.common.own_width_attention import OwnWidthAttention

__all__ = ["shape_attributes"]

Shape = tuple[int, ...]
Rule = Callable[[Any, Mapping[str, Shape]], dict[str, Any]]

# Names of the tensor, of the same shape, that a module computes its tensor `{}` from: under a parametrization
# (original1 is the direction of weight_norm), or under the older hooks of torch.nn.utils, where `{}_orig` comes first,
# because spectral_norm has a vector `{}_v` as well.
_SOURCE_NAMES = ("parametrizations.{}.original", "parametrizations.{}.original1", "{}_orig", "{}_v")
_GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}


def _shape(shapes: Mapping[str, Shape], name: str) -> Shape | None:
    """Return the shape of a tensor of the module, also of a parametrized one; None if the module has no such tensor."""
    if name in shapes:
        return tuple(shapes[name])
    return next((tuple(shapes[key]) for source in _SOURCE_NAMES if (key := source.format(name)) in shapes), None)


def _conv(module: _ConvNd, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return channels and groups of a convolution.

    The weight is (out_channels, in_channels per group, *kernel), and (in_channels, out_channels per group, *kernel) if
    the convolution is transposed.
    """
    weight = _shape(shapes, "weight")
    if weight is None:
        return {}
    transposed = isinstance(module, _ConvTransposeNd)
    outer, inner = weight[0], weight[1]
    old_outer = module.in_channels if transposed else module.out_channels
    old_inner = (module.out_channels if transposed else module.in_channels) // module.groups
    groups = module.groups
    per_group = old_outer // groups
    # Either whole groups were removed, and each group left has its old size, or all groups lost the same positions.
    if groups > 1 and inner == old_inner and outer != old_outer and outer % per_group == 0:
        groups = outer // per_group
    names = ("in_channels", "out_channels") if transposed else ("out_channels", "in_channels")
    return {names[0]: outer, names[1]: inner * groups, "groups": groups}


def _linear(module: nn.Linear, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the features of a linear layer, whose weight is (out_features, in_features)."""
    weight = _shape(shapes, "weight")
    return {} if weight is None else {"out_features": weight[0], "in_features": weight[1]}


def _bilinear(module: nn.Bilinear, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the features of a bilinear layer, whose weight is (out_features, in1_features, in2_features)."""
    weight = _shape(shapes, "weight")
    names = ("out_features", "in1_features", "in2_features")
    return {} if weight is None else dict(zip(names, weight, strict=True))


def _batch_norm(module: _NormBase, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the features of a batch or instance norm, from its weight or, without one, from its running mean."""
    vector = _shape(shapes, "weight") or _shape(shapes, "running_mean")
    return {} if vector is None else {"num_features": vector[0]}


def _layer_norm(module: nn.LayerNorm | nn.RMSNorm, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the normalized shape, which is the shape of the weight."""
    weight = _shape(shapes, "weight")
    return {} if weight is None else {"normalized_shape": weight}


def _group_norm(module: nn.GroupNorm, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return channels and groups of a group norm."""
    weight = _shape(shapes, "weight")
    if weight is None:
        return {}
    # With one channel in each group, groups are removed with their channels. Otherwise all groups lose the same number.
    num_groups = weight[0] if module.num_groups == module.num_channels else module.num_groups
    return {"num_channels": weight[0], "num_groups": num_groups}


def _embedding(module: nn.Embedding | nn.EmbeddingBag, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return rows and columns of an embedding."""
    weight = _shape(shapes, "weight")
    return {} if weight is None else {"num_embeddings": weight[0], "embedding_dim": weight[1]}


def _prelu(module: nn.PReLU, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the number of slopes of a PReLU."""
    weight = _shape(shapes, "weight")
    return {} if weight is None else {"num_parameters": weight[0]}


def _recurrent(module: nn.RNNBase, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the sizes of a recurrent layer. The rows of its weights are hidden units times gates."""
    inputs, hidden = _shape(shapes, "weight_ih_l0"), _shape(shapes, "weight_hh_l0")
    if inputs is None or hidden is None:
        return {}
    projection = _shape(shapes, "weight_hr_l0")
    gates = _GATES.get(module.mode, 1)
    sizes = {"input_size": inputs[1], "hidden_size": hidden[0] // gates}
    return {**sizes, "proj_size": projection[0]} if projection is not None else sizes


def _recurrent_cell(module: nn.RNNCellBase, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the sizes of a recurrent cell."""
    inputs, hidden = _shape(shapes, "weight_ih"), _shape(shapes, "weight_hh")
    return {} if inputs is None or hidden is None else {"input_size": inputs[1], "hidden_size": hidden[1]}


def _attention(module: nn.MultiheadAttention, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the widths of a multi-head attention, from its packed weights or from those of query, key and value."""
    packed, query = _shape(shapes, "in_proj_weight"), _shape(shapes, "q_proj_weight")
    key, value = _shape(shapes, "k_proj_weight"), _shape(shapes, "v_proj_weight")
    inputs = packed or query
    if inputs is None:
        return {}
    width, inner = inputs[1], inputs[0] // 3 if packed else inputs[0]
    sizes = {"embed_dim": width, "kdim": key[1] if key else width, "vdim": value[1] if value else width}
    # Heads are removed as a whole. Networks of older versions may have heads of another width.
    own = module.head_dim
    is_kept = isinstance(module, OwnWidthAttention) or (own and inner % own == 0)
    return {**sizes, "head_dim": own if is_kept else inner // module.num_heads}


# The first entry that matches a module applies.
_RULES: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Rule], ...] = (
    (_ConvNd, _conv),
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (_NormBase, _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
    (nn.MultiheadAttention, _attention),
)


def shape_attributes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the attributes (``out_channels``, ...) that follow from the shapes of a module's own tensors.

    Args:
        module: The module. It is not changed. Its present attributes are used where the shapes alone are ambiguous (the
            number of groups of a convolution).
        shapes: Local name (``weight``, ``parametrizations.weight.original``) of each of the module's own parameters and
            buffers to the shape that it is going to have.

    Returns:
        Attribute name to its new value: an int, or a tuple of ints for ``normalized_shape``. Empty for a module of an
        unknown kind or without such tensors.

    Example:
        >>> shape_attributes(nn.Conv2d(3, 8, 3), {"weight": (6, 3, 3, 3), "bias": (6,)})
        {'out_channels': 6, 'in_channels': 3, 'groups': 1}
    """
    for kinds, rule in _RULES:
        if isinstance(module, kinds):
            return rule(module, shapes)
    return {}

"""`nn.MultiheadAttention` with an inner width of its own, so that it can lose heads while its input keeps its width.

torch's forward takes the inner width from the input. A module that lost heads, or whose output projection is expanded,
therefore gets the subclass `OwnWidthAttention` as its class; its parameters, attributes and names stay as they are. Its
heads have the width ``head_dim``, and their number follows from the projections.

The class is pickled by name with the modules that have it: it must keep its name and stay in this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Optional, Tuple  # noqa: UP035

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OwnWidthAttention", "is_torch_attention", "own_widths", "update_attention"]


class OwnWidthAttention(nn.MultiheadAttention):
    """Multi-head attention whose inner width differs from the width of its input.

    It computes what `nn.MultiheadAttention` computes, from the same parameters; the output projection is called as a
    module. It has no fast path for inference.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False, whatever the attribute of the instance is: the fused layers of torch do not take this module."""
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor] = None,  # noqa: UP045 - for torch.jit.script
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,  # noqa: UP045
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:  # noqa: UP006, UP045
        """Return the attention output and, with `need_weights`, the weights; the arguments are those of torch.

        Args:
            query: (target, batch, width), (batch, target, width) with ``batch_first``, or (target, width).
            key: The same with the source's length and ``kdim``.
            value: The same with ``vdim``.
            key_padding_mask: (batch, source), True or -inf where a key is ignored.
            need_weights: Whether to return the attention weights.
            attn_mask: (target, source) or (batch * heads, target, source), True or -inf where a key is ignored.
            average_attn_weights: Whether the weights are averaged over the heads.
            is_causal: Whether `attn_mask` is the causal mask.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("`is_causal` is a hint about `attn_mask`, which must be given as well.")
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            if query is key and key is value:
                query = key = value = query.transpose(0, 1)
            else:
                query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

        # (batch, heads, positions, head width)
        q, k, v = self._projected(query, key, value)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        mask = _merged_mask(attn_mask, key_padding_mask, q, k.shape[2], self.bias_k is not None, self.add_zero_attn)
        if self.add_zero_attn:
            k, v = (
                torch.cat([k, torch.zeros_like(k[:, :, :1])], dim=2),
                torch.cat([v, torch.zeros_like(v[:, :, :1])], 2),
            )

        # Attention.
        dropout = self.dropout if self.training else 0.0
        weights: Optional[Tensor] = None  # noqa: UP045
        if need_weights:
            scores = torch.matmul(q * self.head_dim**-0.5, k.transpose(-2, -1))
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, p=dropout) if dropout > 0.0 else weights
            output = torch.matmul(weights, v)
        else:
            causal = is_causal and key_padding_mask is None
            output = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal)
        output = self.out_proj(output.permute(2, 0, 1, 3).contiguous().flatten(2))

        # The layout of the query.
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
        """Return queries, keys and values, (positions, batch, inner width), with the added ones behind the others."""
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if packed is not None and query is key and key is value:
            q, k, v = F.linear(query, packed, bias).chunk(3, dim=-1)
        else:
            if packed is not None:
                weight_q, weight_k, weight_v = packed.chunk(3)
            else:
                weight_q, weight_k, weight_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            if bias is None:
                q, k, v = F.linear(query, weight_q), F.linear(key, weight_k), F.linear(value, weight_v)
            else:
                bias_q, bias_k, bias_v = bias.chunk(3)
                q, k = F.linear(query, weight_q, bias_q), F.linear(key, weight_k, bias_k)
                v = F.linear(value, weight_v, bias_v)
        added_k, added_v = self.bias_k, self.bias_v
        if added_k is not None and added_v is not None:
            batch = k.shape[1]
            k, v = torch.cat([k, added_k.expand(-1, batch, -1)]), torch.cat([v, added_v.expand(-1, batch, -1)])
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """Return (positions, batch, inner width) as (batch, heads, positions, head width)."""
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim).permute(1, 2, 0, 3)


def _merged_mask(
    attn_mask: Optional[Tensor],  # noqa: UP045
    key_padding_mask: Optional[Tensor],  # noqa: UP045
    q: Tensor,
    num_keys: int,
    has_added_key: bool,
    has_zero_key: bool,
) -> Optional[Tensor]:  # noqa: UP045
    """Return one floating-point mask that is added to the scores, (batch, heads, target, source) or broadcast to it.

    Args:
        attn_mask: See `OwnWidthAttention.forward`.
        key_padding_mask: See `OwnWidthAttention.forward`.
        q: (batch, heads, target, head width) queries.
        num_keys: Number of keys before a zero key is added.
        has_added_key: Whether the last of these keys is a parameter, which no mask covers.
        has_zero_key: Whether a key of zeros follows.
    """
    more = int(has_added_key) + int(has_zero_key)
    mask: Optional[Tensor] = None  # noqa: UP045
    if attn_mask is not None:
        mask = F.pad(_as_float(attn_mask, q), (0, more)) if more else _as_float(attn_mask, q)
        if mask.dim() == 3:
            mask = mask.view(q.shape[0], -1, mask.shape[1], mask.shape[2])
    if key_padding_mask is not None:
        padding = F.pad(_as_float(key_padding_mask, q), (0, more)) if more else _as_float(key_padding_mask, q)
        padding = padding.view(q.shape[0], 1, 1, -1)
        mask = padding if mask is None else mask + padding
    return mask


def _as_float(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask of bools as zeros and -inf, and any other one in the dtype of the queries."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return mask.to(like.dtype)


def is_torch_attention(module: nn.Module) -> bool:
    """Return whether a module is torch's attention, with its own width or not; a subclass of a user is not."""
    return type(module) in (nn.MultiheadAttention, OwnWidthAttention)


@contextmanager
def own_widths(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let torch's attention modules take their widths from their parameters for the block."""
    changed = [module for module in modules if type(module) is nn.MultiheadAttention]
    try:
        for module in changed:
            module.__class__ = OwnWidthAttention
        yield
    finally:
        for module in changed:
            module.__class__ = nn.MultiheadAttention


def update_attention(module: nn.Module) -> None:
    """Give torch's attention the class that its present shapes need, and the number of heads that follows from them.

    Args:
        module: Any module; one that is not torch's attention does not change.
    """
    if not isinstance(module, nn.MultiheadAttention) or not is_torch_attention(module):
        return
    weight = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
    inner, width = weight.shape[0] // (1 if module.in_proj_weight is None else 3), weight.shape[1]
    if module.head_dim:
        module.num_heads = inner // module.head_dim
    output = module.out_proj
    is_plain = inner == width == module.num_heads * module.head_dim and output.weight.shape == (width, width)
    is_plain = is_plain and not output._forward_hooks and "forward" not in vars(output)
    module.__class__ = nn.MultiheadAttention if is_plain else OwnWidthAttention

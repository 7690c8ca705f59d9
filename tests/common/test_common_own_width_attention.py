"""Attention with its own width computes what torch's attention computes."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from gflow_pl.common.own_width_attention import OwnWidthAttention, own_widths

SETTINGS = {
    "plain": {},
    "no_bias": {"bias": False},
    "added_key": {"add_bias_kv": True},
    "zero_key": {"add_zero_attn": True},
    "both_keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other_widths": {"kdim": 7, "vdim": 5},
    "batch_first": {"batch_first": True},
}
MASKS = ["none", "bool", "float", "heads", "causal"]


def mask_of(kind, batch, target, source):
    if kind == "bool":
        return torch.rand(target, source) > 0.9
    if kind == "float":
        return torch.randn(target, source).double()
    if kind == "heads":
        return torch.randn(batch * 3, target, source).double()
    return torch.full((target, source), -torch.inf).double().triu(1) if kind == "causal" else None


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("mask", MASKS)
def test_outputs_and_weights_are_those_of_torch(settings, mask):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, **SETTINGS[settings]).double().eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    own = copy.deepcopy(attention)
    own.__class__ = OwnWidthAttention
    for weights, average, padded, batched, is_self in product([False, True], repeat=5):
        if (mask == "causal" and (padded or "key" in settings)) or (is_self and settings == "other_widths"):
            continue
        target, source = 4, 4 if is_self or mask == "causal" else 6

        def sequence(length, width, batched=batched):
            x = torch.randn(2, length, width).double()
            return (x if attention.batch_first else x.transpose(0, 1)) if batched else x[0]

        query = sequence(target, 12)
        key, value = (query, query) if is_self else (sequence(source, attention.kdim), sequence(source, attention.vdim))
        padding = torch.zeros(2, source).double()
        padding[0, -1] = -torch.inf
        padding = padding.bool() if mask == "bool" else padding
        arguments = {
            "key_padding_mask": (padding if batched else padding[0]) if padded else None,
            "need_weights": weights,
            "attn_mask": mask_of(mask, 1 + batched, target, source),
            "average_attn_weights": average,
            "is_causal": mask == "causal",
        }
        with torch.no_grad():  # the mask of bools may hide all keys of a query: NaN in both
            expected, found = (module(query, key, value, **arguments) for module in (attention, own))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_causal_hint_needs_the_mask():
    own, x = nn.MultiheadAttention(12, 3), torch.randn(4, 2, 12)
    with own_widths([own]), pytest.raises(RuntimeError, match="attn_mask"):
        own(x, x, x, is_causal=True)
    assert type(own) is nn.MultiheadAttention


def test_the_class_is_given_back_after_an_error():
    modules, types = [nn.MultiheadAttention(12, 3), nn.Linear(2, 2)], []

    def fail():
        with own_widths(modules):
            types.extend(map(type, modules))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert types == [OwnWidthAttention, nn.Linear]
    assert [type(module) for module in modules] == [nn.MultiheadAttention, nn.Linear]

"""Random networks of more than forty kinds of operators, and a masked twin that no graph is needed for.

Every parameter and buffer holds numbers that occur once, so the numbers of a pruned tensor tell which of its positions
were kept.
"""

import copy
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

__all__ = ["KINDS", "RandomNetwork", "identified_twin", "unique_numbers"]

_SIDE = 4
_DECOYS = range(2, 41)


def _halves(wide):
    return wide if wide % 2 == 0 else None


class _Step(nn.Module):
    """One operator of a random network. Its attributes hold the numbers 2 to 40 as decoys.

    Args:
        kind: Kind of the operator.
        wide: Channels of the first operand.
        other: Channels of the second operand.
        width: Channels that a new layer gets.

    Attributes:
        made: Channels of the result; None if the operator does not fit these widths.
    """

    def __init__(self, kind, wide, other, width):
        super().__init__()
        self.kind, self.made = kind, wide
        for number in _DECOYS:
            setattr(self, f"decoy_{number}", number)
        build = getattr(self, f"_build_{kind}", None)
        if build is not None:
            build(wide, other, width)

    def forward(self, x, y):
        return getattr(self, f"_run_{self.kind}")(x, y)

    # -- convolutions and linear layers

    def _build_conv(self, wide, other, width):
        self.layer, self.made = nn.Conv2d(wide, width, 3, padding=1), width

    def _build_pointwise(self, wide, other, width):
        self.layer, self.made = nn.Conv2d(wide, width, 1, bias=False), width

    def _build_dilated(self, wide, other, width):
        self.layer, self.made = nn.Conv2d(wide, width, 3, padding=2, dilation=2), width

    def _build_grouped(self, wide, other, width):
        self.made = 2 * width if _halves(wide) else None
        self.layer = nn.Conv2d(wide, 2 * width, 1, groups=2) if self.made else None

    def _build_depthwise(self, wide, other, width):
        self.layer = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)

    def _build_multiplied(self, wide, other, width):
        self.layer, self.made = nn.Conv2d(wide, 2 * wide, 3, padding=1, groups=wide), 2 * wide

    def _build_transposed(self, wide, other, width):
        self.layer, self.made = nn.ConvTranspose2d(wide, width, 3, padding=1), width

    def _build_linear(self, wide, other, width):
        self.layer, self.made = nn.Linear(wide, width), width

    def _build_shared(self, wide, other, width):
        self.layer = nn.Conv2d(wide, wide, 3, padding=1)

    def _build_weight_norm(self, wide, other, width):
        self.layer, self.made = parametrizations.weight_norm(nn.Conv2d(wide, width, 1)), width

    def _build_standardized(self, wide, other, width):
        self.layer, self.made = nn.Conv2d(wide, width, 3, padding=1), width

    def _build_scaled(self, wide, other, width):
        self.weight, self.scale = nn.Parameter(torch.empty(width, wide)), nn.Parameter(torch.empty(width, 1))
        self.made = width

    def _build_bottleneck(self, wide, other, width):
        self.a, self.b = nn.Conv2d(wide, width, 1), nn.Conv2d(width, wide, 1)
        self.norm = nn.BatchNorm2d(width)

    def _build_conv1d(self, wide, other, width):
        self.layer, self.made = nn.Conv1d(wide, width, 3, padding=1), width

    def _build_product(self, wide, other, width):
        self.weight, self.made = nn.Parameter(torch.empty(wide, width)), width

    def _build_einsum(self, wide, other, width):
        self.weight, self.made = nn.Parameter(torch.empty(width, wide)), width

    def _build_embedded(self, wide, other, width):
        self.table = nn.Embedding(_SIDE, wide)

    _run_conv = _run_pointwise = _run_dilated = _run_grouped = _run_depthwise = _run_multiplied = lambda self, x, y: (
        self.layer(x)
    )
    _run_transposed = _run_weight_norm = _run_conv

    def _run_linear(self, x, y):
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _run_shared(self, x, y):
        return self.layer(self.layer(x).relu())

    def _run_standardized(self, x, y):
        weight = self.layer.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 0.1)
        return F.conv2d(x, weight, self.layer.bias, padding=1)

    def _run_scaled(self, x, y):
        return F.linear(x.movedim(1, -1), self.weight * self.scale).movedim(-1, 1)

    def _run_bottleneck(self, x, y):
        return x + self.b(self.norm(self.a(x)).relu())

    def _run_conv1d(self, x, y):
        return self.layer(x.flatten(2)).unflatten(2, (_SIDE, _SIDE))

    def _run_product(self, x, y):
        return (x.movedim(1, -1) @ self.weight).movedim(-1, 1)

    def _run_einsum(self, x, y):
        return torch.einsum("bchw,oc->bohw", x, self.weight)

    def _run_embedded(self, x, y):
        return x + self.table(torch.arange(_SIDE, device=x.device)).t()[None, :, :, None]

    # -- norms, activations and gates

    def _build_batch_norm(self, wide, other, width):
        self.layer = nn.BatchNorm2d(wide)

    def _build_instance_norm(self, wide, other, width):
        self.layer = nn.InstanceNorm2d(wide, affine=True)

    def _build_group_norm(self, wide, other, width):
        self.made = _halves(wide)
        self.layer = nn.GroupNorm(2, wide) if self.made else None

    def _build_single_group_norm(self, wide, other, width):
        self.layer = nn.GroupNorm(1, wide)

    def _build_layer_norm(self, wide, other, width):
        self.layer = nn.LayerNorm(wide)

    def _build_rms_norm(self, wide, other, width):
        self.layer = nn.RMSNorm(wide)

    def _build_prelu(self, wide, other, width):
        self.layer = nn.PReLU(wide)

    def _build_layer_scale(self, wide, other, width):
        self.scale = nn.Parameter(torch.empty(wide, 1, 1))

    def _build_buffer_scale(self, wide, other, width):
        self.register_buffer("scale", torch.empty(1, wide, 1, 1))

    def _build_gate(self, wide, other, width):
        self.a, self.b = nn.Conv2d(wide, width, 1), nn.Conv2d(width, wide, 1)

    def _build_linear_gate(self, wide, other, width):
        self.layer = nn.Linear(wide, wide)

    def _build_gated_unit(self, wide, other, width):
        self.layer, self.made = nn.Conv2d(wide, 2 * width, 1), width

    def _build_channel_attention(self, wide, other, width):
        self.layer = nn.Conv1d(1, 1, 3, padding=1)

    _run_batch_norm = _run_instance_norm = _run_group_norm = _run_single_group_norm = _run_prelu = _run_conv

    def _run_layer_norm(self, x, y):
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    _run_rms_norm = _run_layer_norm

    def _run_layer_scale(self, x, y):
        return x * self.scale

    _run_buffer_scale = _run_layer_scale

    def _run_gate(self, x, y):
        return x * self.b(self.a(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()

    def _run_linear_gate(self, x, y):
        return x * self.layer(x.mean((2, 3))).sigmoid()[:, :, None, None]

    def _run_gated_unit(self, x, y):
        return F.glu(self.layer(x), 1)

    def _run_channel_attention(self, x, y):
        return x * self.layer(x.mean((2, 3))[:, None]).sigmoid().squeeze(1)[:, :, None, None]

    def _run_relu(self, x, y):
        return x.relu()

    def _run_sigmoid(self, x, y):
        return x.sigmoid()

    def _run_gelu(self, x, y):
        return F.gelu(x)

    def _run_softmax(self, x, y):
        return x.softmax(1)

    # -- two operands

    def _build_add(self, wide, other, width):
        self.made = wide if wide == other else None

    _build_sub = _build_mul = _build_maximum = _build_stack = _build_lerp = _build_add

    def _build_cat(self, wide, other, width):
        self.made = wide + other

    def _build_outer(self, wide, other, width):
        self.made = wide

    def _run_add(self, x, y):
        return x + y

    def _run_sub(self, x, y):
        return x - y

    def _run_mul(self, x, y):
        return x * y.tanh()

    def _run_maximum(self, x, y):
        return torch.maximum(x, y)

    def _run_stack(self, x, y):
        return torch.stack([x, y]).sum(0)

    def _run_lerp(self, x, y):
        return torch.lerp(x, y, 0.3)

    def _run_cat(self, x, y):
        return torch.cat([x, y], 1)

    def _run_outer(self, x, y):
        return x * y.mean(1, keepdim=True)

    # -- splitting, joining, views and indices

    def _build_chunk(self, wide, other, width):
        self.made = wide // 2 if _halves(wide) else None

    _build_unbind = _build_chunk

    def _build_split(self, wide, other, width):
        self.first = max(1, wide // 3)

    def _build_shuffle(self, wide, other, width):
        self.made = _halves(wide)

    _build_heads = _build_shuffle

    def _build_pixel_shuffle(self, wide, other, width):
        self.made = wide // 4 if wide % 4 == 0 else None

    def _build_index(self, wide, other, width):
        self.register_buffer("order", torch.randperm(wide))

    def _build_slice(self, wide, other, width):
        self.made = wide - 1 if wide > 1 else None

    def _build_pad(self, wide, other, width):
        self.made = wide + 2

    def _build_repeat(self, wide, other, width):
        self.made = 2 * wide

    _build_interleave = _build_repeat

    def _build_mean(self, wide, other, width):
        self.made = 1

    _build_amax = _build_mean

    def _run_chunk(self, x, y):
        a, b = x.chunk(2, 1)
        return a - b

    def _run_unbind(self, x, y):
        a, b = x.unflatten(1, (2, -1)).unbind(1)
        return a * b.sigmoid()

    def _run_split(self, x, y):
        a, b = x.split([self.first, x.shape[1] - self.first], 1)
        return torch.cat([b, a.relu()], 1)

    def _run_shuffle(self, x, y):
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    def _run_heads(self, x, y):
        return x.view(x.shape[0], 2, -1, *x.shape[2:]).flip(1).reshape(x.shape)

    def _run_pixel_shuffle(self, x, y):
        return F.avg_pool2d(F.pixel_shuffle(x, 2), 2)

    def _run_index(self, x, y):
        return x.index_select(1, self.order)

    def _run_slice(self, x, y):
        return x[:, 1:]

    def _run_flip(self, x, y):
        return x.flip(1)

    def _run_roll(self, x, y):
        return x.roll(1, 1)

    def _run_pad(self, x, y):
        return F.pad(x, (0, 0, 0, 0, 1, 1))

    def _run_repeat(self, x, y):
        return x.repeat(1, 2, 1, 1)

    def _run_interleave(self, x, y):
        return x.repeat_interleave(2, 1)

    def _run_mean(self, x, y):
        return x.mean(1, keepdim=True)

    def _run_amax(self, x, y):
        return x.amax(1, keepdim=True)

    def _run_pool(self, x, y):
        return F.max_pool2d(x, 3, stride=1, padding=1)

    def _run_resize(self, x, y):
        return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0)

    # -- attention

    def _build_attention(self, wide, other, width):
        self.made, self.num_heads = wide if wide % 2 == 0 else None, 2
        self.qkv, self.out = nn.Linear(wide, 24), nn.Linear(8, wide)

    def _build_multihead(self, wide, other, width):
        self.made = _halves(wide)
        self.layer = nn.MultiheadAttention(wide, 2, batch_first=True) if self.made else None

    def _run_attention(self, x, y):
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(len(x), _SIDE**2, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
        return self.out(z).transpose(1, 2).unflatten(2, (_SIDE, _SIDE))

    def _run_multihead(self, x, y):
        tokens = x.flatten(2).transpose(1, 2)
        return self.layer(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).unflatten(2, (_SIDE, _SIDE))


KINDS = tuple(name.removeprefix("_run_") for name in vars(_Step) if name.startswith("_run_"))
"""All kinds of operators."""
_WIDTHS = (4, 6, 8, 12)


class RandomNetwork(nn.Module):
    """A random network for images of 4x4 pixels. Equal seeds give equal networks.

    Every step reads one or two results of earlier steps, mostly late ones. The number `pick` steers which result the
    head reads: it must not follow the width of a layer.

    Args:
        seed: Seed of the network and its numbers.
    """

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        draw = random.Random(seed)
        widths, self.steps, self.reads = [3], nn.ModuleList(), []
        # Every kind follows a convolution and is followed by one in some network, so that a wrong rule shows.
        kinds = ["conv", KINDS[seed % len(KINDS)], "conv"]
        for number in range(draw.randint(6, 14)):
            a = len(widths) - 1
            if number >= len(kinds):
                a = max(0, a - min(draw.randrange(4), draw.randrange(4)))
            equal = [i for i, width in enumerate(widths) if width == widths[a]]
            b = draw.choice(equal) if draw.random() < 0.7 else draw.randrange(len(widths))
            kind = kinds[number] if number < len(kinds) else draw.choice(KINDS)
            step = _Step(kind, widths[a], widths[b], 8 if number == 0 else draw.choice(_WIDTHS))
            if step.made is not None and step.made <= 48:
                self.steps.append(step)
                self.reads.append((a, b))
                widths.append(step.made)
        self.pick = len(widths) - 1
        self.head = nn.Linear(widths[-1], 3)
        unique_numbers(self.double())

    def forward(self, x):
        results = [x]
        for step, (a, b) in zip(self.steps, self.reads, strict=True):
            results.append(step(results[a], results[b]))
        return self.head(results[self.pick].mean((2, 3)))


def unique_numbers(model):
    """Fill all floating point parameters and buffers with random numbers that occur once; variances are positive."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
                tensor.copy_(drawn + 0.5 if "var" in name or tensor.ndim == 1 else (drawn - 0.5) * 1.5)


def identified_twin(full, pruned):
    """Return a copy of a network in which every position that its pruned copy lost is zero.

    Which positions these are follows from the numbers in the tensors, and from nothing that the pruning wrote.

    Args:
        full: The network, with unique numbers.
        pruned: A pruned copy of it.
    """
    twin = copy.deepcopy(full)
    tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    left = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.shape == left[name].shape:
            continue
        numbers, order = np.unique(tensor.detach().numpy().ravel(), return_index=True)
        assert len(numbers) == tensor.numel()
        kept = left[name].detach().numpy()
        found = np.minimum(np.searchsorted(numbers, kept), len(numbers) - 1)
        assert (numbers[found] == kept).all(), f"{name} holds numbers that the network did not have"
        # Flat, because `unravel_index` of numpy 2.4 is wrong for large arrays of several dimensions.
        coordinates = np.unravel_index(order[found].ravel(), tuple(tensor.shape))
        with torch.no_grad():
            for dim, places in enumerate(coordinates):
                if dim == 0 and name.endswith("original1"):
                    continue  # a direction of length zero has no norm; its length, `original0`, is zero in any case
                lost = np.setdiff1d(np.arange(tensor.shape[dim]), places)
                tensor.index_fill_(dim, torch.from_numpy(lost), 0)
    return twin

"""Networks whose modules hold and use weights themselves, without `nn.Linear` and torch's convolutions."""

import torch
import torch.nn.functional as F
from torch import nn


class OwnLinear(nn.Module):
    """A linear layer around `F.linear`, or, like the `Conv1D` of GPT-2, around `addmm` with a weight (in, out)."""

    def __init__(self, num_in, num_out, inputs_first=False):
        super().__init__()
        self.nf, self.inputs_first = num_out, inputs_first
        shape = (num_in, num_out) if inputs_first else (num_out, num_in)
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(shape)), nn.Parameter(torch.randn(num_out))

    def forward(self, x):
        if not self.inputs_first:
            return F.linear(x, self.weight, self.bias)
        sizes = (*x.shape[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return x.view(sizes)


class OwnAttention(nn.Module):
    """The attention of GPT-2: one layer computes queries, keys and values, and its output is split."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.split_size, self.head_dim = width, width // heads
        self.c_attn, self.c_proj = OwnLinear(width, 3 * width, True), OwnLinear(width, width, True)

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.c_attn(x).split(self.split_size, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.c_proj(y.reshape(*y.shape[:2], -1).contiguous())


class OwnBlock(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = OwnAttention(width)
        self.c_fc, self.c_proj = OwnLinear(width, 4 * width, True), OwnLinear(4 * width, width, True)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class LanguageModel(nn.Module):
    """A language model like GPT-2, whose head is its embedding."""

    def __init__(self, width=12, blocks=2):
        super().__init__()
        self.wte, self.h = nn.Embedding(20, width), nn.ModuleList(OwnBlock(width) for _ in range(blocks))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 20, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Products(nn.Module):
    """Weights of one module that several operators apply."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(16))
        self.v, self.u = nn.Parameter(torch.randn(12, 16)), nn.Parameter(torch.randn(10, 12))
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = F.relu(x @ self.w + self.b)
        x = F.relu(torch.einsum("bi,oi->bo", x, self.v))
        return self.head(torch.matmul(self.u, x.T).T)


class Convolutions(nn.Module):
    """Kernels of one module: a plain, a depthwise and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.plain, self.depthwise = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8, 1, 3, 3))
        self.norm, self.transposed = nn.BatchNorm2d(8), nn.Parameter(torch.randn(8, 6, 2, 2))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.norm(F.conv2d(x, self.plain, padding=1)))
        x = F.relu(F.conv2d(x, self.depthwise, groups=len(self.depthwise), padding=1))
        return self.head(F.conv_transpose2d(x, self.transposed, stride=2).mean((2, 3)))

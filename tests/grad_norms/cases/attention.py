"""Attention, transformers and whole models."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.grad_norms.problem import EITHER, Problem, case


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.batch_first = options.get("batch_first", False)
        self.inner = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x, mask=None, attn_mask=None):
        x = self.inner(x)
        x = x if self.batch_first else x.transpose(0, 1)
        out = self.attention(x, x, x, key_padding_mask=mask, attn_mask=attn_mask, need_weights=mask is None)[0]
        return out if self.batch_first else out.transpose(0, 1)


for batch_first in (True, False):
    for n, length in ((5, 3), (4, 4)):

        @case("MultiheadAttention", f"self, batch_first={batch_first}, N = {n}, T = {length}")
        def self_attention(batch_first=batch_first, n=n, length=length):
            return Problem(SelfAttention(batch_first=batch_first), (torch.randn(n, length, 8),))

    @case("MultiheadAttention", f"cross, batch_first={batch_first}")
    def cross_attention(batch_first=batch_first):
        class Cross(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

            def forward(self, x, memory):
                if batch_first:
                    return self.attention(x, memory, memory)[0]
                x, memory = x.transpose(0, 1), memory.transpose(0, 1)
                return self.attention(x, memory, memory)[0].transpose(0, 1)

        return Problem(Cross(), (torch.randn(5, 3, 8), torch.randn(5, 4, 8)))


for name, options in {
    "without bias": {"bias": False},
    "bias_k and bias_v": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
}.items():

    @case("MultiheadAttention", name, EITHER)
    def attention_option(options=options):
        return Problem(SelfAttention(batch_first=True, **options), (torch.randn(5, 3, 8),))


@case("MultiheadAttention", "kdim and vdim")
def other_dims():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True)

        def forward(self, x, keys, values):
            return self.attention(x, keys, values)[0]

    return Problem(Cross(), (torch.randn(5, 3, 8), torch.randn(5, 4, 5), torch.randn(5, 4, 3)))


@case("MultiheadAttention", "key_padding_mask")
def padding_mask():
    mask = torch.arange(4) >= torch.tensor([[4], [2], [3], [1], [4]])
    return Problem(SelfAttention(batch_first=True), (torch.randn(5, 4, 8), mask))


@case("MultiheadAttention", "causal mask, N = T")
def causal_mask():
    class Causal(SelfAttention):
        def forward(self, x):
            return super().forward(x, attn_mask=torch.full((4, 4), -torch.inf).triu(1).to(x.dtype))

    return Problem(Causal(batch_first=True), (torch.randn(4, 4, 8),))


@case("MultiheadAttention", "a mask [T, T] given as an input, N = T", EITHER)
def given_mask():
    class Given(SelfAttention):
        def forward(self, x, attn_mask):
            return super().forward(x, attn_mask=attn_mask)

    mask = torch.full((4, 4), -torch.inf).triu(1)
    return Problem(Given(batch_first=True), (torch.randn(4, 4, 8),), shared=(mask,))


LAYERS = {
    "train": (lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), True),
    "eval": (lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True), False),
    "norm_first, GELU": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=True),
        True,
    ),
    "without bias": (lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, bias=False), True),
}
for name, (layer, train) in LAYERS.items():

    @case("TransformerEncoderLayer", name)
    def encoder_layer(layer=layer, train=train):
        return Problem(layer().train(train), (torch.randn(5, 3, 8),))


@case("TransformerEncoderLayer", "time first inside, two layers, N = T")
def encoder_time_first():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x):
            return self.encoder(x.transpose(0, 1)).mean(0)

    return Problem(Inner(), (torch.randn(4, 4, 8),))


@case("TransformerEncoderLayer", "eval, with a padding mask (nested tensors)", EITHER)
def encoder_nested():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x, mask):
            return self.encoder(x, src_key_padding_mask=mask).masked_fill(mask[..., None], 0.0)

    mask = torch.arange(4) >= torch.tensor([[4], [2], [3], [1], [4]])
    return Problem(Inner().eval(), (torch.randn(5, 4, 8), mask))


@case("TransformerDecoderLayer", "train")
def decoder_layer():
    layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return Problem(layer, (torch.randn(5, 3, 8), torch.randn(5, 4, 8)))


@case("Transformer", "encoder and decoder")
def transformer():
    model = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)
    return Problem(model, (torch.randn(5, 3, 8), torch.randn(5, 4, 8)))


class Block(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.heads = heads

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = (z.view(n, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A small GPT: positions from arange, the head tied to the token embedding; returns a loss sum, as language models do."""

    def __init__(self, vocabulary=13, d=8, length=6, depth=2, heads=2):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.token.weight

    def forward(self, ids):
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_token(model, inputs, shared):
    """Cross-entropy sum over the next tokens."""
    logits = model(inputs[0])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[0][:, 1:].flatten(), reduction="sum")


for n, length in ((5, 6), (6, 6), (1, 4)):

    @case("Models", f"GPT with a tied head, N = {n}, T = {length}")
    def gpt(n=n, length=length):
        return Problem(GPT(), (torch.randint(13, (n, length)),), loss=next_token)


class Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(2, outer), nn.GroupNorm(2, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        # a 1 x 1 kernel with stride 2 writes out of bounds in the channels_last CPU backward of PyTorch 2.13 itself
        self.down = nn.Conv2d(inner, outer, 2, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += self.down(x)
        return self.relu(out)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        Residual(4, 4, 1),
        Residual(4, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def classify(model, inputs, shared):
    return F.cross_entropy(model(inputs[0]), inputs[1], reduction="sum")


@case("Models", "GroupNorm ResNet")
def group_norm_resnet():
    return Problem(resnet(), (torch.randn(6, 3, 8, 8), torch.randint(5, (6,))), loss=classify)


@case("Models", "GroupNorm ResNet, channels_last")
def channels_last_resnet():
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    return Problem(resnet().to(memory_format=torch.channels_last), (x, torch.randint(5, (4,))), loss=classify)


class ViT(nn.Module):
    """Patches by convolution, a class token by expand and cat, learned positions, LayerScale."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.scale = nn.Parameter(0.3 * torch.randn(8))
        self.block, self.head = Block(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        return self.head((x + self.scale * self.block(x))[:, 0])


for n in (6, 5, 1):

    @case("Models", f"ViT, N = {n}, T = 5")
    def vit(n=n):
        return Problem(ViT(), (torch.randn(n, 3, 8, 8), torch.randint(3, (n,))), loss=classify)


@case("Models", "U-Net with skip connections")
def unet():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Conv2d(2, 4, 3, padding=1)
            self.middle = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
            self.up, self.last = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            high = self.down(x).relu()
            low = self.middle(F.max_pool2d(high, 2)).relu()
            return self.last(torch.cat([high, self.up(low)], 1)) + F.interpolate(low, scale_factor=2)[:, :2]

    return Problem(UNet(), (torch.randn(4, 2, 6, 4),))


@case("Models", "mixture of experts, rows gathered and scattered", EITHER)
def experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(6, 3)
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            rows = x.reshape(-1, 6)
            weights, chosen = self.router(rows).softmax(-1).max(-1)
            out = torch.zeros_like(rows)
            for i, expert in enumerate(self.experts):
                picked = (chosen == i).nonzero().squeeze(-1)
                out = out.index_add(0, picked, expert(rows[picked]) * weights[picked, None])
            return out.view_as(x)

    return Problem(Experts(), (torch.randn(5, 4, 6),))


@case("Models", "hypernetwork: weights made from the sample", EITHER)
def hypernetwork():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.make = nn.Linear(4, 6 * 5)

        def forward(self, x, context):
            return torch.bmm(x, self.make(context).view(-1, 6, 5))

    return Problem(Hyper(), (torch.randn(5, 3, 6), torch.randn(5, 4)))

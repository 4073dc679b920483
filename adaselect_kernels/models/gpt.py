"""A small GPT (Radford et al. 2019): pre-norm blocks, causal attention, learned positions, a head that may be tied."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GPT(nn.Module):
    """Tokens [B, T] to hidden states [B, T, width], of which `head` [vocabulary, width] makes logits.

    The forward stops at the hidden states, so that the logits [B, T, vocabulary] need never be stored:
    `TokenSelector.select` and `selected_linear_cross_entropy` take hidden states and `head`; `logits` multiplies them out.

    vocabulary: number of tokens. context: longest T. width: of the hidden states, a multiple of heads.
    layers: blocks of causal attention and an MLP four times as wide, each behind a LayerNorm, added to their input.
    tied: the head is the embedding of the tokens; otherwise a matrix of its own.
    No dropout. Weights start at N(0, 0.02), those that write into the residual stream at 0.02 / sqrt(2 layers).

    Raises TypeError or ValueError for sizes below 1 or heads that do not divide width; the forward raises ValueError for
    tokens that are not [B, T] with 1 <= T <= context.

    >>> model = GPT(vocabulary=50, context=16, width=8, layers=1, heads=2)
    >>> hidden = model(torch.zeros(2, 5, dtype=torch.int64))
    >>> hidden.shape, model.logits(hidden).shape
    (torch.Size([2, 5, 8]), torch.Size([2, 5, 50]))
    """

    def __init__(
        self, vocabulary: int, context: int, width: int = 128, layers: int = 4, heads: int = 4, tied: bool = True
    ) -> None:
        sizes = {"vocabulary": vocabulary, "context": context, "width": width, "layers": layers, "heads": heads}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.own_head = None if tied else nn.Parameter(torch.empty(vocabulary, width))
        self._initialise(layers)

    @property
    def head(self) -> Tensor:
        """The classifier [vocabulary, width]."""
        return self.embedding.weight if self.own_head is None else self.own_head

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.context:
            raise ValueError(f"tokens must be [B, T] with T in [1, {self.context}], got shape {tuple(tokens.shape)}")
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., vocabulary] of hidden states [..., width]."""
        return F.linear(hidden, self.head)

    def _initialise(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("attention.out.weight", "shrink.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.mlp_norm, self.grow, self.shrink = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.shrink(F.gelu(self.grow(self.mlp_norm(x))))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

"""Networks of the Llama family (Llama, Qwen2, Qwen3) with the interface of model/gpt.py.

Five things differ from GPT-2: norms without a mean (RMSNorm), rotary positions (RoPE), a gated MLP (SwiGLU),
keys and values shared by groups of heads (GQA), and an output layer that need not be the embedding table.
Parameter names are those of Hugging Face `transformers`.

Shapes: B rows, T positions of this forward pass, C width, H heads, G key-value heads, D head size,
V vocabulary, N positions read, S cache slots attended to.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model.gpt import Cache

NEVER = -1e4    # logit of a token that is never generated; with -inf its term in a KL divergence would be NaN


@dataclass
class LlamaConfig:
    vocab: int              # V, tokens
    context: int            # maximum number of positions
    layers: int
    heads: int              # H
    width: int              # C
    kv_heads: int           # G
    head_size: int          # D; in Qwen3 not always C / H
    hidden: int             # channels inside the MLP
    family: str = "llama"   # qwen2: biases of queries, keys and values; qwen3: norms of queries and keys
    theta: float = 1e4      # base of the rotary wavelengths
    eps: float = 1e-6       # of the norms
    tied: bool = False      # the output layer is the embedding table
    mask: int | None = None     # id of [MASK] in the vocabulary; None: [MASK] is id V, as in model/gpt.py

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads}: must be a multiple of kv_heads={self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size}: must be even, RoPE rotates pairs of channels")
        if self.mask is not None and not 0 <= self.mask < self.vocab:
            raise ValueError(f"mask id {self.mask} is outside the vocabulary: expected 0 to {self.vocab - 1} "
                             "(mask_token_id in config.json)")

    @property
    def matrices(self) -> int:
        """Number of weights in the matrices of one block."""
        attention_channels = 2 * (self.heads + self.kv_heads) * self.head_size
        return self.width * (attention_channels + 3 * self.hidden)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        precise = x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 would lose digits
        mean_square = precise.square().mean(-1, keepdim=True)
        normed = precise * torch.rsqrt(mean_square + self.eps)
        return self.weight * normed.to(x.dtype)


def rotations(position: Tensor, config: LlamaConfig, dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the RoPE angles, each (T, 1, D/2) for `position` (T,), (B, T, 1, D/2) for (B, T)."""
    channel = torch.arange(0, config.head_size, 2, device=position.device)
    exponent = channel.float() / config.head_size                # (D/2,)
    frequency = 1 / config.theta ** exponent                     # the same rounding as in `transformers`
    angle = position[..., None, None].float() * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """(B, T, H, D): RoPE. Channels i and i + D/2 are rotated as a pair; `rotation` comes from `rotations`."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)                                        # (B, T, H, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_size = config.head_size
        q_width = config.heads * config.head_size
        kv_width = config.kv_heads * config.head_size
        has_bias = config.family == "qwen2"
        has_norm = config.family == "qwen3"
        self.q_proj = nn.Linear(config.width, q_width, bias=has_bias)
        self.k_proj = nn.Linear(config.width, kv_width, bias=has_bias)
        self.v_proj = nn.Linear(config.width, kv_width, bias=has_bias)
        self.o_proj = nn.Linear(q_width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_size, config.eps) if has_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size, config.eps) if has_norm else nn.Identity()

    def forward(self, x, mask, rotation, cache, cache_index, read=None):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_size))   # (B, T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_size))   # (B, T, G, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_size))   # (B, T, G, D)
        q = rotate(self.q_norm(q), rotation)
        k = rotate(self.k_norm(k), rotation)
        if cache is not None:
            kv = torch.stack([k, v], 2)                          # (B, T, 2, G, D)
            kv = cache.write(kv, cache_index, mask.size(-1))     # (B, S, 2, G, D)
            k, v = kv.unbind(2)
        group = q.size(2) // k.size(2)  # heads that share one key-value head
        q = q.transpose(1, 2)                                    # (B, H, T, D)
        k = k.repeat_interleave(group, 2).transpose(1, 2)        # (B, H, T or S, D)
        v = v.repeat_interleave(group, 2).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(2)                         # (B, T, H * D)
        if read is not None:
            y = y.flatten(0, 1)[read]                            # (N, H * D)
        return self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x):
        gate = F.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.mlp = MLP(config)

    def forward(self, x, mask, rotation, cache, cache_index):
        x = x + self.self_attn(self.input_layernorm(x), mask, rotation, cache, cache_index)
        return x + self.mlp(self.post_attention_layernorm(x))


class LastBlock(Block):
    """Computes its output only at the positions that are read. All positions serve as keys and values."""

    def forward(self, x, mask, rotation, cache, cache_index, read):
        residual = x
        if read is not None:
            residual = x.flatten(0, 1)[read]                     # (N, C)
        x = residual + self.self_attn(self.input_layernorm(x), mask, rotation, cache, cache_index, read)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        first_blocks = [Block(config) for _ in range(config.layers - 1)]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab, config.width),
            "layers": nn.ModuleList([*first_blocks, LastBlock(config)]),
            "norm": RMSNorm(config.width, config.eps),
        })
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        self.mask_vector = None     # (C,) the embedding of [MASK], if that is not a token of the vocabulary
        if config.mask is None:
            self.mask_vector = nn.Parameter(torch.zeros(config.width))

    @property
    def wte(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def h(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def mask_id(self) -> int:
        return self.config.vocab if self.config.mask is None else self.config.mask

    def forward(self, tokens: Tensor, mask: Tensor | None = None, position: Tensor | None = None,
                read: Tensor | None = None, cache: list[Cache] | None = None,
                cache_index: Tensor | None = None, head: Callable = F.linear) -> Tensor:
        """(N, V) logits; the arguments are those of `GPT.forward`. `head` also gets a bias (V,) or None."""
        if position is None:
            position = torch.arange(tokens.size(1), device=tokens.device)
        if cache is None:
            cache = [None] * len(self.h)
        x = self.embed(tokens)                                   # (B, T, C)
        rotation = rotations(position, self.config, x.dtype)
        for block, block_cache in zip(self.h[:-1], cache):
            x = block(x, mask, rotation, block_cache, cache_index)
        x = self.h[-1](x, mask, rotation, cache[-1], cache_index, read)
        x = x.reshape(-1, x.size(-1))                            # (N, C)
        output_layer = self.lm_head or self.wte
        return head(self.model.norm(x), output_layer.weight, self.logit_bias(x))

    def logit_bias(self, x: Tensor) -> Tensor | None:
        """(V,), in the dtype of `x`: keeps a [MASK] that is in the vocabulary from being generated."""
        if self.config.mask is None:
            return None
        mask_id = torch.tensor(self.config.mask, device=x.device)
        return F.one_hot(mask_id, self.config.vocab).to(x.dtype) * NEVER

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T, C): the row of a token in the table, or the [MASK] vector."""
        if self.mask_vector is None:
            return self.wte(tokens)
        is_mask = tokens == self.mask_id
        table_row = tokens.masked_fill(is_mask, 0)  # the table has no row for [MASK]
        x = self.wte(table_row)
        return torch.where(is_mask[..., None], self.mask_vector.to(x.dtype), x)

    @torch.no_grad()
    def init_mask(self) -> "Llama":
        """Set the [MASK] vector to the mean embedding. A [MASK] in the vocabulary keeps its trained row."""
        if self.mask_vector is not None:
            mean_embedding = self.wte.weight.mean(0)
            self.mask_vector.copy_(mean_embedding)
        return self

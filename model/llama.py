"""The Llama layout (Llama, Qwen2, Qwen3) behind the forward of model/gpt.py, under Hugging Face's parameter names.

Differs from GPT-2 in five places: norms without a mean (RMSNorm), positions as rotations of queries and keys (RoPE), a
gated MLP (SwiGLU), keys and values that groups of heads share, and a head of its own where it is not tied.

Letters: B rows, T positions of this forward, C width, H heads, G key-value heads, D head size, V vocabulary, S cache
slots, N places read.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model.gpt import Cache, check_fixed, select, sizes

NEVER = -1e4    # the logit of what can't be generated: its probability is 0, and 0 times it is 0, not NaN as with -inf

# config.json: our sizes by its names, and what this network can't vary; where the file is silent, the first is meant
NAMES = {"vocab": "vocab_size", "context": "max_position_embeddings", "layers": "num_hidden_layers",
         "heads": "num_attention_heads", "width": "hidden_size", "kv_heads": "num_key_value_heads",
         "head_size": "head_dim", "hidden": "intermediate_size"}
QWEN = {"hidden_act": ("silu",), "attention_bias": (False, None), "use_sliding_window": (False, None)}
FIXED = {"qwen2": QWEN, "qwen3": QWEN, "llama": {"hidden_act": ("silu",), "attention_bias": (False, None),
                                                 "mlp_bias": (False, None), "sliding_window": (None,)}}


@dataclass
class LlamaConfig:
    vocab: int              # V, tokens
    context: int            # most positions
    layers: int
    heads: int              # H
    width: int              # C
    kv_heads: int           # G
    head_size: int          # D, in Qwen3 no part of the width
    hidden: int             # channels inside the MLP
    family: str = "llama"   # qwen2 has biases on queries, keys and values; qwen3 has norms on queries and keys
    theta: float = 1e4      # base of the rotations' wavelengths
    eps: float = 1e-6       # of the norms
    tied: bool = False      # the head is the embedding
    mask: int | None = None     # [MASK], if it is a token of the vocabulary; none: the id V, a vector without a logit

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads can't share {self.kv_heads} key-value heads: make them a multiple")
        if self.head_size % 2:
            raise ValueError(f"a head of {self.head_size} channels can't be rotated in pairs: make it even")
        if self.mask is not None and not 0 <= self.mask < self.vocab:
            raise ValueError(f"the mask id {self.mask} is not in the vocabulary: one below {self.vocab} was wanted")

    @property
    def matrices(self) -> int:
        """Weights of one block's matrices."""
        return self.width * (2 * (self.heads + self.kv_heads) * self.head_size + 3 * self.hidden)


def config_of(said: dict, mask: int | None = None) -> LlamaConfig:
    """The sizes of a config.json. Where it is silent: as many key-value heads as heads, which share the width; Qwen3's
    have 128 channels."""
    family, heads = said["model_type"].removeprefix("a2d-"), said["num_attention_heads"]
    check_fixed(said, FIXED[family])
    size = said.get("head_dim") or (128 if family == "qwen3" else said["hidden_size"] // heads)
    said = {**said, "head_dim": size, "num_key_value_heads": said.get("num_key_value_heads") or heads}
    return LlamaConfig(**sizes(said, NAMES), family=family, theta=rope_theta(said), mask=mask,
                       eps=float(said.get("rms_norm_eps", 1e-6)), tied=bool(said.get("tie_word_embeddings")))


def rope_theta(said: dict) -> float:
    """Base of the rotations. Scaled ones (linear, dynamic, yarn, longrope, llama3) and windows are refused by name."""
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", said.get("partial_rotary_factor", 1.0))
    if kind != "default" or part != 1:
        raise ValueError(f"RoPE is {kind!r}, over {part:.0%} of a head: 'default', unscaled, and all of it was wanted")
    windows = set(said.get("layer_types") or ()) - {"full_attention"}
    if windows:
        raise ValueError(f"layer_types has {', '.join(sorted(windows))}: full_attention alone was wanted")
    return float(rope.get("rope_theta", said.get("rope_theta", 1e4)))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))     # a mean of squares in bf16 has two digits
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotations(position: Tensor, config: LlamaConfig, dtype) -> tuple[Tensor, Tensor]:
    """(T, 1, D/2) or (B, T, 1, D/2) twice: cosine and sine of each pair's angle at `position` (T,) or (B, T)."""
    pair = torch.arange(0, config.head_size, 2, device=position.device).float() / config.head_size
    angle = position[..., None, None].float() * (1 / config.theta ** pair)             # in the order of transformers
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """(B, T, H, D): channel i is turned together with channel i + D/2."""
    (a, b), (cos, sin) = x.chunk(2, -1), turn                                           # (B, T, H, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        size, self.size = config.head_size, config.head_size
        bias = config.family == "qwen2"
        self.q_proj = nn.Linear(config.width, config.heads * size, bias=bias)
        self.k_proj = nn.Linear(config.width, config.kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(config.width, config.kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.heads * size, config.width, bias=False)
        for name in ("q_norm", "k_norm"):
            self.add_module(name, RMSNorm(size, config.eps) if config.family == "qwen3" else nn.Identity())

    def forward(self, x, mask, turn, cache, at, read=None):
        q, k, v = (proj(x).unflatten(-1, (-1, self.size)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), turn), rotate(self.k_norm(k), turn)               # (B, T, H, D), (B, T, G, D)
        if cache is not None:
            k, v = cache.write(torch.stack((k, v), 2), at, mask.size(-1)).unbind(2)     # (B, S, G, D)
        k, v = (y.repeat_interleave(q.size(2) // y.size(2), 2) for y in (k, v))         # (B, T or S, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)               # (B, H, T or S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(select(y.transpose(1, 2).flatten(2), read))                   # (B, T, C) or (N, C)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(config.width, config.eps), Attention(config)
        self.post_attention_layernorm, self.mlp = RMSNorm(config.width, config.eps), MLP(config)

    def forward(self, x, mask, turn, cache, at):
        x = x + self.self_attn(self.input_layernorm(x), mask, turn, cache, at)
        return x + self.mlp(self.post_attention_layernorm(x))


class LastBlock(Block):
    """Of the positions that nobody reads it needs no more than their keys and values."""

    def forward(self, x, mask, turn, cache, at, read):
        x = select(x, read) + self.self_attn(self.input_layernorm(x), mask, turn, cache, at, read)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(config.vocab, config.width),
                                    "layers": nn.ModuleList([*(Block(config) for _ in range(config.layers - 1)),
                                                            LastBlock(config)]),
                                    "norm": RMSNorm(config.width, config.eps)})
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        own = nn.Parameter(torch.zeros(config.width)) if config.mask is None else None
        self.register_parameter("mask_vector", own)         # (C,) what stands under [MASK]; none: its row of the table

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
                read: Tensor | None = None, cache: list[Cache] | None = None, at: Tensor | None = None,
                head: Callable = F.linear) -> Tensor:
        """(N, V) logits; the arguments are those of `GPT.forward`."""
        if position is None:
            position = torch.arange(tokens.size(1), device=tokens.device)
        x, caches = self.embed(tokens), cache or [None] * len(self.h)                   # (B, T, C)
        turn = rotations(position, self.config, x.dtype)
        for block, its_cache in zip(self.h[:-1], caches):
            x = block(x, mask, turn, its_cache, at)
        x = self.h[-1](x, mask, turn, caches[-1], at, read)
        x = x.reshape(-1, x.size(-1))                                                   # (N, C)
        x, table, bias = self.model.norm(x), (self.lm_head or self.wte).weight, None    # (N, C), (V, C)
        if self.config.mask is not None:
            bias = F.one_hot(torch.tensor(self.config.mask, device=x.device), len(table)).to(x.dtype) * NEVER   # (V,)
        return head(x, table, bias)                                                     # (N, V)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T, C): a token's row of the table, or the [MASK] vector."""
        if self.mask_vector is None:
            return self.wte(tokens)
        masked = tokens == self.mask_id
        return torch.where(masked[..., None], self.mask_vector, self.wte(tokens.masked_fill(masked, 0)))

    @torch.no_grad()
    def init_mask(self) -> "Llama":
        """[MASK] begins as the mean embedding; a row that a checkpoint has for it stays as it was trained."""
        if self.mask_vector is not None:
            self.mask_vector.copy_(self.wte.weight.mean(0))
        return self

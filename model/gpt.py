"""GPT-2 as in nanoGPT, with what a diffusion language model needs in addition:

    mask       the attention mask is an argument (model/masks.py); the default is causal
    position   positions are an argument too: in training, clean and noisy text have the same ones
    [MASK]     has an embedding vector of its own and no logit, so it is never generated
    read       logits are computed only at the positions that are read
    cache      a KV cache with one slot per position, written by index

Parameter names are GPT-2's. model/llama.py has the same interface.

Shapes: B rows, T positions of this forward pass, C width, H heads, D = C / H head size, V vocabulary,
N positions read, S cache slots attended to, G key-value heads (here G = H; fewer in model/llama.py).
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    vocab: int = 50257      # V, tokens; id V is [MASK]
    context: int = 1024     # maximum number of positions
    layers: int = 12
    heads: int = 12         # H
    width: int = 768        # C
    family: str = "gpt2"

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width={self.width}: must be a multiple of heads={self.heads}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def matrices(self) -> int:
        """Number of weights in the matrices of one block."""
        return 12 * self.width ** 2


class Cache:
    """Keys and values of one block: a slot per position, and one more slot to write padding to."""

    def __init__(self, slots: int):
        self.slots = slots      # also the index of the slot for padding
        self.kv = None          # (B, slots + 1, 2, G, D), allocated by the first write

    def flat_index(self, slot: Tensor) -> Tensor:
        """(B * T,) indices for `write`, which numbers the slots of all rows together. `slot` (B, T)."""
        row = torch.arange(len(slot), device=slot.device)[:, None]
        index = row * (self.slots + 1) + slot
        return index.flatten()

    def write(self, kv: Tensor, index: Tensor, length: int) -> Tensor:
        """Store keys and values (B, T, 2, G, D) at `index` (B * T,).

        Returns the keys and values in the first `length` slots of each row, (B, length, 2, G, D).
        """
        if self.kv is None:
            self.kv = kv.new_zeros(kv.size(0), self.slots + 1, *kv.shape[2:])
        all_slots = self.kv.view(-1, *kv.shape[2:])              # (B * (slots + 1), 2, G, D), the same memory
        all_slots.index_copy_(0, index, kv.flatten(0, 1))
        return self.kv[:, :length]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these (a bool or index tensor)."""
        if self.kv is not None:
            self.kv = self.kv[rows]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x, mask, cache, cache_index, read=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.heads, C // self.heads)
        q, kv = qkv.split([1, 2], dim=2)                         # (B, T, 1, H, D), (B, T, 2, H, D)
        if cache is not None:  # it stores keys and values in one tensor
            kv = cache.write(kv, cache_index, mask.size(-1))     # (B, S, 2, H, D)
        k, v = kv.unbind(2)
        q = q.squeeze(2).transpose(1, 2)                         # (B, H, T, D)
        k = k.transpose(1, 2)                                    # (B, H, T or S, D)
        v = v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, C)
        if read is not None:
            y = y.flatten(0, 1)[read]                            # (N, C)
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x):
        x = self.c_fc(x)
        x = F.gelu(x, approximate="tanh")
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache, cache_index):
        x = x + self.attn(self.ln_1(x), mask, cache, cache_index)
        return x + self.mlp(self.ln_2(x))


class LastBlock(Block):
    """Computes its output only at the positions that are read. All positions serve as keys and values."""

    def forward(self, x, mask, cache, cache_index, read):
        residual = x
        if read is not None:
            residual = x.flatten(0, 1)[read]                     # (N, C)
        x = residual + self.attn(self.ln_1(x), mask, cache, cache_index, read)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.width)      # also the output layer
        self.wpe = nn.Embedding(config.context, config.width)
        first_blocks = [Block(config) for _ in range(config.layers - 1)]
        self.h = nn.ModuleList([*first_blocks, LastBlock(config)])
        self.ln_f = nn.LayerNorm(config.width)
        self.mask_vector = nn.Parameter(torch.zeros(config.width))  # (C,) the embedding of [MASK]

    @property
    def mask_id(self) -> int:
        return self.config.vocab

    def forward(self, tokens: Tensor, mask: Tensor | None = None, position: Tensor | None = None,
                read: Tensor | None = None, cache: list[Cache] | None = None,
                cache_index: Tensor | None = None, head: Callable = F.linear) -> Tensor:
        """(N, V) logits of the positions `read`, or (B * T, V) logits of all positions.

        tokens       (B, T) token ids
        mask         bool, broadcast to (B, 1, T, T), with a cache to (B, 1, T, S); None: causal
        position     (T,) or (B, T) positions of the tokens; None: 0 .. T - 1
        read         (N,) indices into B * T; None: all
        cache        one per block; attention is over its first S slots
        cache_index  (B * T,) where keys and values are written, from Cache.flat_index
        head         what is computed from the hidden states (N, C) and the table (V, C)
        """
        if position is None:
            position = torch.arange(tokens.size(1), device=tokens.device)
        if cache is None:
            cache = [None] * len(self.h)
        x = self.embed(tokens) + self.wpe(position)              # (B, T, C)
        for block, block_cache in zip(self.h[:-1], cache):
            x = block(x, mask, block_cache, cache_index)
        x = self.h[-1](x, mask, cache[-1], cache_index, read)    # (B, T, C) or (N, C)
        x = x.reshape(-1, x.size(-1))                            # (N, C)
        return head(self.ln_f(x), self.wte.weight)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T, C): the row of a token in the table, or the [MASK] vector."""
        is_mask = tokens == self.mask_id
        table_row = tokens.masked_fill(is_mask, 0)  # the table has no row for [MASK]
        x = self.wte(table_row)
        return torch.where(is_mask[..., None], self.mask_vector.to(x.dtype), x)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> "GPT":
        """GPT-2's initialization: normal with standard deviation 0.02, less for projections onto the residual
        stream; biases are 0, norms 1.
        """
        residual_scale = 1 / math.sqrt(2 * self.config.layers)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = residual_scale if name.endswith("c_proj.weight") else 1.0
                p.normal_(0, 0.02 * scale, generator=generator)
            elif name.endswith("bias"):
                p.zero_()
        return self

    @torch.no_grad()
    def init_mask(self) -> "GPT":
        """Set the [MASK] vector to the mean embedding."""
        mean_embedding = self.wte.weight.mean(0)
        self.mask_vector.copy_(mean_embedding)
        return self


def checkpointed(net: nn.Module, enabled: bool = True) -> nn.Module:
    """The network itself. If `enabled`, its blocks recompute their activations in the backward pass.

    That takes less memory and one more forward pass. Gradients are the same.
    """
    if enabled:
        for block in net.h:
            # `forward` is replaced, not the block: parameter names stay, and the hooks of FSDP stay outside
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return net


def without_output_layer(hidden: Tensor, *output_layer: Tensor) -> tuple[Tensor, tuple]:
    """A `head` of `forward`. Instead of logits: hidden states (N, C), and what makes logits of them."""
    return hidden, output_layer

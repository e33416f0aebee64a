"""GPT-2, with the attention mask as an argument, a [MASK] vector, and a KV cache that is written to, not returned.

Differs from nanoGPT in these places only: `mask` (who may look at whom, model/masks.py), `position` (the two streams of
a training pass share their positions), `read` and `head` (logits are made only where somebody looks at them), `cache`.
Parameter names are GPT-2's.

Letters: B rows, T positions of this forward, C width, H heads, D = C / H, V vocabulary, S cache slots, N places read,
G heads of keys and values: H here, fewer in model/llama.py.
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

# config.json: our sizes by its names, and what this network can't vary; where the file is silent, the first is meant
NAMES = {"vocab": "vocab_size", "context": "n_positions", "layers": "n_layer", "heads": "n_head", "width": "n_embd"}
FIXED = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,), "n_inner": (None,),
         "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
         "tie_word_embeddings": (True,)}


@dataclass
class GPTConfig:
    vocab: int = 50257      # V, tokens; the id V itself is [MASK], which has a vector but no logit
    context: int = 1024     # most positions
    layers: int = 12
    heads: int = 12
    width: int = 768        # C
    family: str = "gpt2"

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} can't be shared by {self.heads} heads: make it a multiple")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def matrices(self) -> int:
        """Weights of one block's matrices."""
        return 12 * self.width ** 2


def check_fixed(said: dict, fixed: dict) -> None:
    """Names what this network can't do and config.json asks for."""
    for key, values in fixed.items():
        if said.get(key, values[0]) not in values:
            raise ValueError(f"{key} is {said[key]!r} in its config.json: {values[0]!r} was wanted")


def sizes(said: dict, names: dict) -> dict:
    """The whole numbers of config.json by our names."""
    for key in names.values():
        if type(said.get(key)) is not int or said[key] < 1:
            raise ValueError(f"{key} is {said.get(key)!r} in its config.json: a whole number was wanted")
    return {ours: said[key] for ours, key in names.items()}


def config_of(said: dict) -> GPTConfig:
    """The sizes of a config.json, of which everything else must be as it is here."""
    inner = said.get("n_inner")
    check_fixed({**said, "n_inner": None if inner == 4 * said["n_embd"] else inner}, FIXED)
    return GPTConfig(**sizes(said, NAMES))


class Cache:
    """A block's keys and values of finished text, one slot a position, allocated once. One slot more, the last, is a
    dump for padding."""

    def __init__(self, slots: int):
        self.slots, self.kept, self.flat = slots, None, None

    def place(self, at: Tensor) -> Tensor:
        """(B * T,): the slots `at` (B, T) of all rows as one index."""
        return (torch.arange(len(at), device=at.device)[:, None] * (self.slots + 1) + at).flatten()

    def write(self, kv: Tensor, place: Tensor, upto: int) -> Tensor:
        """Store keys and values (B, T, 2, G, D) at `place` (B * T,); those to attend to, (B, upto, 2, G, D)."""
        if self.kept is None:                        # rows, heads and number format are those of the first that come
            self.hold(kv.new_zeros(kv.size(0), self.slots + 1, *kv.shape[2:]))      # (B, S+1, 2, G, D)
        self.flat.index_copy_(0, place, kv.flatten(0, 1))
        return self.kept[:, :upto]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (a bool or index tensor)."""
        if self.kept is not None:
            self.hold(self.kept[rows])

    def hold(self, kept: Tensor) -> None:
        self.kept, self.flat = kept, kept.flatten(0, 1)                                 # one memory, (B * (S+1), ...)


def select(x: Tensor, read: Tensor | None) -> Tensor:
    """(N, C): those of x (B, T, C) that somebody reads, or all as they are."""
    return x if read is None else x.flatten(0, 1)[read]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x, mask, cache, at, read=None):
        B, T, C = x.shape
        q, kv = self.c_attn(x).view(B, T, 3, self.heads, C // self.heads).split((1, 2), 2)    # (B, T, 1 and 2, H, D)
        if cache is not None:
            kv = cache.write(kv, at, mask.size(-1))                                     # (B, S, 2, H, D)
        q, (k, v) = q[:, :, 0].transpose(1, 2), kv.transpose(1, 3).unbind(2)            # (B, H, T or S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(select(y.transpose(1, 2).reshape(B, T, C), read))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.width), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.width), MLP(config)

    def forward(self, x, mask, cache, at):
        x = x + self.attn(self.ln_1(x), mask, cache, at)
        return x + self.mlp(self.ln_2(x))


class LastBlock(Block):
    """Of the positions that nobody reads it needs no more than their keys and values."""

    def forward(self, x, mask, cache, at, read):
        x = select(x, read) + self.attn(self.ln_1(x), mask, cache, at, read)
        return x + self.mlp(self.ln_2(x))


def checkpointed(net: nn.Module, wanted: bool = True) -> nn.Module:
    """The network; if wanted, its blocks keep only what they are given, and are run once more in the backward pass: the
    same gradients with less memory, for one forward pass more. Passes without gradients are what they were."""
    for block in net.h if wanted else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)  # no dropout
    return net


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList([*(Block(config) for _ in range(config.layers - 1)), LastBlock(config)])
        self.ln_f = nn.LayerNorm(config.width)
        self.mask_vector = nn.Parameter(torch.zeros(config.width))                      # (C,) what stands under [MASK]

    @property
    def mask_id(self) -> int:
        return self.config.vocab

    def forward(self, tokens: Tensor, mask: Tensor | None = None, position: Tensor | None = None,
                read: Tensor | None = None, cache: list[Cache] | None = None, at: Tensor | None = None,
                head: Callable = F.linear) -> Tensor:
        """(N, V) logits at the places `read`, flat indices into the (B, T) of `tokens`; without `read` at all B * T.

        `mask`: bool, broadcast to (B, 1, T, T), or (B, 1, T, S) with a cache; none is causal. `position`: (T,), (B, T).
        With `cache`, one a block, keys and values go to its places `at` (B * T,); its first S slots are attended to.
        Another `head` makes something else of the hidden states (N, C) and the table (V, C): model/targets.py.
        """
        if position is None:
            position = torch.arange(tokens.size(1), device=tokens.device)
        x, caches = self.embed(tokens) + self.wpe(position), cache or [None] * len(self.h)      # (B, T, C)
        for block, its_cache in zip(self.h[:-1], caches):
            x = block(x, mask, its_cache, at)
        x = self.h[-1](x, mask, caches[-1], at, read)                                   # (N, C)
        return head(self.ln_f(x.reshape(-1, x.size(-1))), self.wte.weight)              # (N, V)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T, C): a token's row of the table, or the [MASK] vector."""
        masked = tokens == self.mask_id
        return torch.where(masked[..., None], self.mask_vector, self.wte(tokens.masked_fill(masked, 0)))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> "GPT":
        """GPT-2's: normal of 0.02, less for what is added to the residual stream; biases 0, norms 1."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = 1 / math.sqrt(2 * self.config.layers) if name.endswith("c_proj.weight") else 1.0
                p.normal_(0, 0.02 * scale, generator=generator)
            elif name.endswith("bias"):
                p.zero_()
        return self

    @torch.no_grad()
    def init_mask(self) -> "GPT":
        """[MASK] begins as the mean embedding: a token that says nothing in particular."""
        self.mask_vector.copy_(self.wte.weight.mean(0))
        return self

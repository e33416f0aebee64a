"""Randomness is a tensor: uniform numbers made ahead, and the tokens that they draw.

Letters: B rows, M slots, V vocabulary.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def uniforms(seed: int, stream: int, rows: range, shape: tuple) -> Tensor:
    """(B, *shape) numbers in [0, 1), a function of (seed, stream, row's global number) alone: so a row depends neither
    on its batch mates nor on the number of processes, and a debugger replays any row."""
    def draw(row):
        source = np.random.Philox(key=[seed, row], counter=[0, 0, 0, stream])
        return np.random.Generator(source).random(shape, dtype=np.float32)
    return torch.from_numpy(np.stack([draw(row) for row in rows]))


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """(M,): the token at which the cumulative distribution of `probs` (M, V) passes `u` (M,)."""
    cdf = probs.cumsum(-1)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=probs.size(-1) - 1)


def tempered(probs: Tensor, temperature: float) -> Tensor:
    """(M, V): probs ** (1 / temperature), normalised; at 0, all on the most likely token."""
    if temperature == 0:
        return F.one_hot(probs.argmax(-1), probs.size(-1)).to(probs)
    return probs if temperature == 1 else (probs.log() / temperature).softmax(-1)

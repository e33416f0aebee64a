"""Randomness is a tensor: uniform numbers made ahead, and the tokens that they draw.

Letters: B rows, M slots, V vocabulary.
"""
from dataclasses import dataclass

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


@dataclass(frozen=True)
class SamplingConfig:
    """What tokens are drawn from: probs ** (1 / temperature), of these the `top_k` likeliest, of these the fewest that
    have `top_p` of all together; normalised. At temperature 0 all is on the most likely token."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        top_k, top_p = (1 if x is None else x for x in (self.top_k, self.top_p))
        if self.temperature < 0 or top_k < 1 or not 0 < top_p <= 1:
            raise ValueError(f"{self}: wanted are a temperature of at least 0, a top_k of at least 1 and a top_p "
                             "above 0 and at most 1")

    def sample(self, probs: Tensor, u: Tensor) -> Tensor:
        """(M,): tokens of `probs` (M, V) by the numbers `u` (M,)."""
        return probs.argmax(-1) if self.temperature == 0 else inverse_cdf(self(probs), u)

    def __call__(self, probs: Tensor) -> Tensor:
        """(M, V) of (M, V)."""
        if self.temperature == 0:
            return F.one_hot(probs.argmax(-1), probs.size(-1)).to(probs)
        probs = probs if self.temperature == 1 else (probs.log() / self.temperature).softmax(-1)
        if self.top_k is None and self.top_p is None:
            return probs
        best, token = probs.sort(dim=-1, descending=True, stable=True)
        best = best * (torch.arange(best.size(-1), device=best.device) < (self.top_k or best.size(-1)))
        share = best / best.sum(-1, keepdim=True)
        kept = share * (share.cumsum(-1) - share < (self.top_p or 2))      # what is before it has not got top_p yet
        return torch.zeros_like(probs).scatter(-1, token, kept / kept.sum(-1, keepdim=True))

"""Randomness is a tensor: uniform random numbers made in advance, and the tokens sampled with them.

Shapes: B rows, M positions, V vocabulary.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SEED = 2 ** 63 - 1      # NumPy rounds larger keys, so that different seeds would have the same numbers
MIN_TEMPERATURE = 1e-6      # below, float32 does not tell close probabilities apart: the most likely token
MAX_TEMPERATURE = 1e30      # near the largest float32, above which a quotient is not a number


class NotFiniteError(ValueError):
    """A network has computed NaN or infinity."""


def uniforms(seed: int, stream: int, rows: range, shape: tuple) -> Tensor:
    """(B, *shape) float32 random numbers in [0, 1), a function of seed, stream and each row's global number.

    So a row depends neither on the other rows of its batch nor on the number of processes, and any row can be
    generated again in a debugger. `stream` separates uses of the same seed. ValueError if the seed is not
    from 0 to 2**63 - 1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed}: expected an integer from 0 to {MAX_SEED}")
    numbers = []
    for row in rows:
        source = np.random.Philox(key=[seed, row], counter=[0, 0, 0, stream])
        generator = np.random.Generator(source)
        numbers.append(generator.random(shape, dtype=np.float32))
    return torch.from_numpy(np.stack(numbers))


def is_end(tokens: Tensor, eot: int | tuple[int, ...]) -> Tensor:
    """Bool, the shape of `tokens`: whether a token ends its text. `eot` is one id, or several."""
    if isinstance(eot, tuple):
        ends = torch.tensor(eot, device=tokens.device)
        return torch.isin(tokens, ends)
    return tokens == eot


def padding_id(eot: int | tuple[int, ...]) -> int:
    """The end-of-text that texts are padded with: the first one."""
    return eot[0] if isinstance(eot, tuple) else eot


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """(M,) tokens: where the cumulative distribution of `probs` (M, V) first exceeds `u` (M,) in [0, 1).

    `probs` need not sum to 1.
    """
    cdf = probs.cumsum(-1)
    target = u * cdf[:, -1]
    token = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    return token.clamp(max=probs.size(-1) - 1)  # `target` may be rounded up to the last value of the cdf


def check_finite(probs: Tensor) -> None:
    """NotFiniteError if a row of `probs` (M, V) is NaN, as a softmax is of logits with NaN or infinity."""
    first_column = probs[:, 0]      # if one value of a softmax is NaN, all are
    if first_column.isnan().any():
        raise NotFiniteError("the model's numbers are not finite (NaN or infinity), so it has no "
                             "probabilities to sample from: its weights are damaged or its training has "
                             "diverged; use another checkpoint")


@dataclass(frozen=True)
class SamplingConfig:
    """How a distribution is changed before a token is sampled from it. The order is that of the fields.

    Temperature: probs ** (1 / temperature), normalized; 0, or less than MIN_TEMPERATURE, puts all
    probability on the most likely token. Top-k: the k most likely tokens are kept. Top-p: of these, the most
    likely ones are kept, as few as have at least this share of the probability together. None keeps all.
    """
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"expected a temperature of at least 0, got {self.temperature}")
        if self.temperature > MAX_TEMPERATURE:
            raise ValueError(f"expected a temperature of at most {MAX_TEMPERATURE}, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"expected a top_k of at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"expected a top_p above 0 and at most 1, got {self.top_p}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < MIN_TEMPERATURE

    def sample(self, probs: Tensor, u: Tensor) -> Tensor:
        """(M,) tokens sampled from `probs` (M, V) with the random numbers `u` (M,)."""
        if self.greedy:
            check_finite(probs)
            return probs.argmax(-1)
        return inverse_cdf(self(probs), u)

    def __call__(self, probs: Tensor) -> Tensor:
        """(M, V) the distributions that tokens are sampled from, of the network's `probs` (M, V).

        NotFiniteError if these are NaN.
        """
        check_finite(probs)
        if self.greedy:
            return F.one_hot(probs.argmax(-1), probs.size(-1)).to(probs)
        if self.temperature != 1:
            probs = (probs.log() / self.temperature).softmax(-1)
        if self.top_k is None and self.top_p is None:
            return probs

        best, token = probs.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(best.size(-1), device=best.device)
        top_k = min(self.top_k or best.size(-1), best.size(-1))
        best = best * (rank < top_k)
        share = best / best.sum(-1, keepdim=True)
        share_before = share.cumsum(-1) - share  # of the more likely tokens
        is_kept = (share_before < (self.top_p or 2)) | (rank == 0)
        kept = share * is_kept
        kept = kept / kept.sum(-1, keepdim=True)
        return torch.zeros_like(probs).scatter(-1, token, kept)

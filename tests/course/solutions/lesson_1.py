"""Lesson 1: the states of masked diffusion, and the 1/t-weighted loss.

    python course/01_masks_and_the_bound/exercise.py          the demonstration at the end of this file
    python course/check.py 1                                  the laws

Write the two functions of part 1. Everything else is given.

Shapes: B rows, R positions, V vocabulary. A state of a text is the text with some of its positions masked.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))    # the project's root

from course import given
from model import masks
from opdlm import student_logits

# 1. to write --------------------------------------------------------------------------------------

def random_state(u: Tensor) -> Tensor:
    """(B, R) bool: one random state per row; True is masked.

    The number n of masked positions is uniform over 1 .. R; given n, each set of n positions is equally
    likely. `u` (B, R, 2) are uniform random numbers in [0, 1). u[:, 0, 0] decides n. u[:, :, 1] decides which
    positions: those with the n smallest numbers. (In the project: opdlm.random_mask, for each block.)
    """
    R = u.size(1)
    n = 1 + (u[:, 0, 0] * R).long()                                          # (B,)
    rank = u[:, :, 1].argsort(-1).argsort(-1)                                # (B, R)
    return rank < n[:, None]


def state_loss(logits: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    """(B,) nats: the loss of one state per row, weighted by 1 / t.

    `logits` (B, R, V) predict the text `tokens` (B, R) from the state `masked` (B, R) bool. The loss of a
    position is -log of the probability of its token. t is the share of the positions that are masked.
    """
    log_probs = logits.log_softmax(-1)                                       # (B, R, V)
    nats = -log_probs.gather(-1, tokens[..., None])[..., 0]                  # (B, R)
    t = masked.sum(-1) / masked.size(-1)                                     # (B,)
    return (nats * masked).sum(-1) / t


# 2. given: the demonstration ----------------------------------------------------------------------

@torch.no_grad()
def logits_of_states(net, tokens: Tensor, masked: Tensor, layout, prompt: int) -> Tensor:
    """(B, R, V) logits of the shipped student, which predict the last R positions of `tokens` (B, T)."""
    B, R = masked.shape
    noisy = tokens[:, prompt:].masked_fill(masked, net.mask_id)
    rows, slots = torch.ones_like(masked).nonzero(as_tuple=True)
    logits = student_logits(net, tokens, noisy, prompt, layout, rows, slots + prompt)
    return logits.view(B, R, -1)


def demonstration() -> None:
    """One block of a story: its exact nats from left to right, and the bound estimated from random states."""
    net, layout, tok = given.pretrained()
    text = given.encode(tok)
    prompt, K = 12, layout.block
    text = text[:, :prompt + K]
    print("text before the block:", tok.decode(text[0, 1:prompt].tolist()))
    print("the block:", tok.decode(text[0, prompt:].tolist()))

    causal = masks.context_mask(prompt + K, prompt, 1)
    log_probs = net(text, causal).log_softmax(-1)[prompt - 1:-1]             # logits at i predict i + 1
    left_to_right = -log_probs.gather(1, text[0, prompt:, None]).sum()
    print(f"left to right, as an AR model: {left_to_right:.3f} nats")

    generator = torch.Generator().manual_seed(0)
    u = torch.rand(400, K, 2, generator=generator)
    masked = random_state(u)                                                 # (400, K)
    tokens = text.expand(400, -1)
    loss = state_loss(logits_of_states(net, tokens, masked, layout, prompt), tokens[:, prompt:], masked)
    error = loss.std() / len(loss) ** 0.5
    print(f"the bound, from 400 states: {loss.mean():.3f} nats (standard error {error:.3f})")
    print(f"one state alone: from {loss.min():.3f} to {loss.max():.3f} nats")


if __name__ == "__main__":
    demonstration()

"""Lesson 2: several tokens revealed by one step, and the error that this makes.

    python course/02_parallel_reveals/exercise.py             the demonstration at the end of this file
    python course/check.py 2                                  the laws

Write the two functions of part 1. Everything else is given.

Shapes: R positions, V vocabulary, N = V ** R texts.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))    # the project's root

from course import given
from decoding import reveal

# 1. to write --------------------------------------------------------------------------------------

def text_probs(joint: Tensor, order: Tensor) -> Tensor:
    """(N,) the probability of every text, in the order of given.all_texts, if a perfect model samples it.

    `joint` (V, ..., V) is the truth, `order` (R,) the step that reveals each position: 0, 1, ... At step k
    all positions with order >= k are masked. The step samples the tokens of the positions with order == k,
    each from its own distribution, independently. given.conditionals(joint, tokens, masked) has these
    distributions: (B, R, V) for the B states (tokens, masked).
    """
    texts = given.all_texts(joint.size(0), joint.dim())                      # (N, R)
    probs = torch.ones(len(texts), dtype=joint.dtype)
    for step in range(int(order.max()) + 1):
        masked = (order >= step).expand(len(texts), -1)                      # (N, R)
        marginals = given.conditionals(joint, texts, masked)                 # (N, R, V)
        of_token = marginals.gather(-1, texts[..., None])[..., 0]            # (N, R)
        probs = probs * of_token[:, order == step].prod(-1)
    return probs


def kl(p: Tensor, q: Tensor) -> Tensor:
    """() nats: the KL divergence from `p` to `q`, both (N,): the mean of log p - log q over texts of p.

    A text that p never writes adds nothing.
    """
    terms = p * (p / q).log()
    return terms[p > 0].sum()


# 2. given: the demonstration ----------------------------------------------------------------------

def pronouns() -> Tensor:
    """(2, 2) a joint of two tokens: half of the texts are "boy ... he", half are "girl ... she"."""
    return torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)


def demonstration() -> None:
    """The error of a toy joint, exactly; then the damage in the stories of the shipped model."""
    joint = pronouns()
    for order in ([0, 1], [0, 0]):
        probs = text_probs(joint, torch.tensor(order))
        error = kl(joint.flatten(), probs)
        print(f"order {order}: boy-he, boy-she, girl-he, girl-she = {probs.tolist()}, error {error:.4f} nats")
    net, layout, tok = given.pretrained()
    for k in (1, 2, 4):
        nats, speed, texts = given.stories(net, layout, tok, reveal.parse(f"static:{k}"))
        print(f"{k} tokens per step: {nats:.2f} nats per token, {speed:.2f} tokens per forward pass")
        print(f"    {texts[0]!r}")


if __name__ == "__main__":
    demonstration()

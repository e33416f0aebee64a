"""Lesson 7: lossless speculative decoding: accept a draft, or resample.

    python course/07_speculative/exercise.py        the demonstration at the end of this file
    python course/check.py 7                        the laws

Write the function of part 1. Everything else is given.

Shapes: B rows, A drafts, V vocabulary.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))    # the project's root

from course import given
from decoding import speculative
from decoding.sampling import SamplingConfig, uniforms

# 1. to write --------------------------------------------------------------------------------------

def accept(p: Tensor, q: Tensor, drafts: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafts are accepted (B,), and the token that follows them (B,).

    `p`, `q` (B, A + 1, V): the distributions of verifier and drafter at A + 1 positions; `drafts` (B, A + 1),
    drawn from q. The last position has no draft: q is 0 there, p(x) / q(x) divides by 0, and what `drafts`
    holds there means nothing; it is never accepted. `u` (B, A + 1, 3): random numbers in [0, 1).

    From the left, the draft x of a position is accepted with probability min(1, p(x) / q(x)), by the number
    u[..., speculative.ACCEPT]. At the first position whose draft is rejected, the token that follows is drawn
    from (p - q)+, the positive part of p - q, which has to be made a distribution again; at the position
    without a draft it is drawn from p. Its number is u[..., speculative.RESAMPLE] of that position. Rounding
    may reject a draft although p = q; then (p - q)+ is zero: draw from p, and do not divide by 0. (In the
    project: decoding/speculative.py, accept.)
    """
    raise NotImplementedError("write me: accept")


# 2. given: the demonstration ----------------------------------------------------------------------

def one_position() -> None:
    """Two distributions over three tokens: the share of accepted drafts, and what is written in the end."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    B = 100_000
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(B, 2, 3, generator=generator, dtype=torch.float64)
    drafts = given.draw(q.expand(B, -1), torch.rand(B, generator=generator, dtype=torch.float64))
    drafts = torch.stack([drafts, torch.zeros_like(drafts)], 1)
    p_rows = p.expand(B, 2, -1)
    q_rows = torch.stack([q, torch.zeros_like(q)]).expand(B, -1, -1)
    num_accepted, token = accept(p_rows, q_rows, drafts, u)
    written = torch.where(num_accepted > 0, drafts[:, 0], token)
    share = written.bincount(minlength=3) / B
    print(f"p = {p.tolist()}, q = {q.tolist()}, {B} drafts from q")
    print(f"accepted: {(num_accepted > 0).double().mean():.3f}")
    print(f"written:  {[round(x, 3) for x in share.tolist()]}")


def demonstration() -> None:
    """One position in numbers; then the shipped student drafts its own text and verifies it."""
    one_position()
    net, layout, tok = given.pretrained()
    prompt = given.encode(tok, "Once upon a time, there was a").expand(16, -1)
    B, P = prompt.shape
    length = 64
    speculative.accept = accept                                  # the project's loop, with your function
    for temperature in (1.0, 0.7, 0.0):
        u = uniforms(0, 0, range(B), (P + length, 3))
        sampling = SamplingConfig(temperature)
        text = speculative.speculative_decode(net, layout, prompt, length, u, tok.eot, sampling)
        num_tokens = (text.accepted_in >= 0).sum()
        iterations = text.accepted_in.amax(1).add(1).sum()
        print(f"temperature {temperature}: {num_tokens / iterations:.3f} tokens per iteration, "
              f"{num_tokens / text.forwards.sum():.3f} per forward pass")
    print(tok.decode(text.tokens[0, 1:].tolist()))


if __name__ == "__main__":
    demonstration()

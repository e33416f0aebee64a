"""Lesson 6: on-policy distillation: visited states, the teacher's targets, the loss.

    python course/06_on_policy/exercise.py          the demonstration at the end of this file
    python course/check.py 6                        the laws

Write the two functions of part 1. Everything else is given.

Shapes: B rows, T positions, P prompt, R = T - P response, K block size, V vocabulary, N masked positions.
"""
import copy
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))    # the project's root

import opdlm
from course import given
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig, uniforms
from model.masks import Layout
from report import metrics

# 1. to write --------------------------------------------------------------------------------------

def visited(order: Tensor, response_mask: Tensor, u: Tensor, block: int) -> Tensor:
    """(B, R) bool: one state of each block, chosen uniformly among those that it passed through.

    `order` (B, R) is the denoising step of its block that revealed a position. State k of a block is what the
    student saw at step k: the positions with order >= k are masked. Only states with at least one masked
    position in the response count. `order` is -1 where no step came; after the end of a text, in its
    last block, there may be numbers that do not belong to the response. `response_mask` (B, R) bool.
    `u` (B, R, 2): random numbers in [0, 1); one per block is used, opdlm.per_block(u, block) (B, blocks, 1).

    opdlm.split_blocks(x, block, fill) makes (B, blocks, K) of (B, R), where `fill` pads the last block;
    opdlm.join_blocks(x, R) goes back. (In the project: opdlm.visited.)
    """
    raise NotImplementedError("write me: visited")


def state_kl(student, teacher, tokens: Tensor, masked: Tensor, P: int, layout: Layout) -> Tensor:
    """(B,) nats: KL divergence from teacher to student, the mean over the masked positions of each row.

    `tokens` (B, T) is the finished text, `masked` (B, R) bool the state of its response; each row has a mask.
    At a masked position, q is the teacher's distribution, which has read the finished text before it, and p
    the student's, which has read the state. The loss is KL(q || p) = sum of q (log q - log p).

    teacher(tokens) are the logits (B * T, V) of an AR model: those at position i - 1 predict token i. No
    gradient goes through the teacher.
    opdlm.student_logits(student, tokens, noisy, P, layout, rows, position) are the student's logits (N, V)
    at N positions of `tokens`, given as `rows` and `position`; `noisy` (B, R) has student.mask_id where it is
    masked.
    (In the project: opdlm.train_step.)
    """
    raise NotImplementedError("write me: state_kl")


# 2. given: the demonstration ----------------------------------------------------------------------

SAMPLING = SamplingConfig(temperature=0.7)
RULE = reveal.parse("static:2")         # two tokens at each step
LENGTH = 32


def write_texts(student, layout: Layout, prompt: Tensor, eot: int, seed: int) -> opdlm.Rollout:
    B, P = prompt.shape
    u = uniforms(seed, 0, range(B), (P + LENGTH, RULE.numbers(layout.block)))
    return opdlm.rollout(Denoiser(student, layout), prompt, LENGTH, RULE, u, eot, SAMPLING)


def measure(name: str, student, teacher, layout: Layout, prompt: Tensor, eot: int) -> None:
    """One line: quality and speed of 64 texts that no update has seen."""
    text = write_texts(student, layout, prompt[:1].expand(64, -1), eot, seed=1)
    num_tokens = text.response_mask.sum()
    nats = metrics.nats_of(teacher, text).sum() / num_tokens
    speed = num_tokens / text.forwards.sum()
    distinct = metrics.distinct_pairs(metrics.response_ids(text))
    print(f"{name}: {nats:.3f} nats per token under the teacher, {speed:.3f} tokens per forward pass, "
          f"distinct2 {distinct:.3f}")


def demonstration() -> None:
    """The states of one text; then a minute of on-policy distillation of the shipped student."""
    student, layout, tok = given.pretrained()
    teacher = copy.deepcopy(student)                             # frozen, and read under the causal mask
    prompt = given.encode(tok, "Once upon a time, there was a")
    P = prompt.size(1)

    text = write_texts(student, layout, prompt, tok.eot, seed=0)
    print("a state of each block, and its loss (_ is a mask):")
    for seed in range(4):
        u = uniforms(seed, 1, range(1), (LENGTH, 2))
        masked = visited(text.order[:, P:], text.response_mask[:, P:], u, layout.block)
        masked = masked & text.response_mask[:, P:]
        loss = state_kl(student, teacher, text.tokens, masked, P, layout)
        pieces = [tok.decode([int(token)]) for token in text.tokens[0, P:]]
        shown = [" _" if is_masked else piece for piece, is_masked in zip(pieces, masked[0])]
        print(f"  {loss.item():.3f} nats  {''.join(shown)}")

    measure("before", student, teacher, layout, prompt, tok.eot)
    student = copy.deepcopy(student).requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    prompts = prompt.expand(16, -1)
    for step in range(60):
        text = write_texts(student, layout, prompts, tok.eot, seed=100 + step)
        u = uniforms(step, 2, range(len(prompts)), (LENGTH, 2))
        masked = visited(text.order[:, P:], text.response_mask[:, P:], u, layout.block)
        masked = masked & text.response_mask[:, P:]
        loss = state_kl(student, teacher, text.tokens, masked, P, layout).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    measure("after 60 updates", student, teacher, layout, prompt, tok.eot)


if __name__ == "__main__":
    demonstration()

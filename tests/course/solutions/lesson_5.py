"""Lesson 5: the exact likelihood of a block-diffusion model, and generative perplexity.

    python course/05_likelihood/exercise.py         the demonstration at the end of this file
    python course/check.py 5                        the laws

Write the two functions of part 1. Everything else is given.

Shapes: B rows, T positions, R = T - 1 positions after the first token, K block size, V vocabulary.
"""
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
from model import masks
from model.masks import Layout
from report import metrics

# 1. to write --------------------------------------------------------------------------------------

def story_nats(net, tokens: Tensor, layout: Layout) -> Tensor:
    """(B,) nats of each text given its first token: -log of its probability under a block-diffusion model.

    The chain rule from left to right. Blocks of K = layout.block positions begin after the first token. Slot
    j of a block is predicted while the slots before it show their tokens, and slot j and those after it are
    masked. One pass scores slot j of all blocks at once, so K passes score a text, a sum over its tokens:

        opdlm.student_logits(net, tokens, noisy, 1, layout, rows, position)

    gives the logits (N, V) for N positions, given as `rows` (N,) and `position` (N,). `noisy` (B, R) is
    tokens[:, 1:] with net.mask_id where it is masked. Position i of `tokens` is column i - 1 of `noisy`. The
    last block may be shorter than K. The check has logits in float64, the demonstration in float32, and
    index_add wants one dtype: convert the nats to that of your sum. (In the project: report/metrics.py,
    story_nats.)
    """
    B = len(tokens)
    slot = torch.arange(tokens.size(1) - 1) % layout.block       # (R,) position within the block
    nats = torch.zeros(B, dtype=net.wte.weight.dtype)
    for j in range(layout.block):
        noisy = tokens[:, 1:].masked_fill(slot >= j, net.mask_id)
        scored = (slot == j).expand(B, -1)                       # (B, R)
        rows, column = scored.nonzero(as_tuple=True)
        position = column + 1
        if len(rows) == 0:                                       # the only block has fewer slots
            continue
        logits = opdlm.student_logits(net, tokens, noisy, 1, layout, rows, position)
        true_token = tokens[rows, position]
        token_log_probs = logits.log_softmax(-1).gather(1, true_token[:, None])[:, 0]
        nats = nats.index_add(0, rows, -token_log_probs)
    return nats


def gen_nats(judge, tokens: Tensor, response_mask: Tensor) -> Tensor:
    """() the mean nats per generated token under an AR model, the judge. exp of it: generative perplexity.

    `tokens` (B, T); `response_mask` (B, T) bool: the generated tokens, never the first position. The mean is
    over all generated tokens of all rows together. judge(tokens) are the logits (B * T, V) of all positions;
    those at position i - 1 predict the token at i. (In the project: report/metrics.py, read_by.)
    """
    log_probs = judge(tokens).view(*tokens.shape, -1).log_softmax(-1)        # (B, T, V)
    token_log_probs = log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return -token_log_probs[response_mask[:, 1:]].mean()


# 2. given: the demonstration ----------------------------------------------------------------------

def show_row(name: str, net, tokens: Tensor, response_mask: Tensor) -> None:
    """One line: generative nats and perplexity, and beside them two measures of variety."""
    nats = gen_nats(net, tokens, response_mask)
    pairs = zip(tokens, response_mask)
    responses = [row[is_response].tolist() for row, is_response in pairs]
    distinct = metrics.distinct_pairs(responses)
    entropy = metrics.unigram_entropy(responses)
    print(f"{name:34}{nats:10.3f}{nats.exp():12.2f}{distinct:11.3f}{abs(entropy):9.2f}")


def demonstration() -> None:
    """A story's likelihood as AR and as block model; then the judge's opinion of good and of silly texts."""
    net, layout, tok = given.pretrained()
    story = given.encode(tok)
    num_tokens = story.size(1) - 1
    print("the story:", tok.decode(story[0, 1:].tolist()))
    for name, how in (("AR model", masks.AR), ("block model, one token at a time", layout)):
        nats = story_nats(net, story, how) / num_tokens
        print(f"{name}: {nats.item():.3f} nats per token")

    print(f"\n{'64 tokens each, judged by the AR':34}{'gen_nats':>10}{'perplexity':>12}{'distinct2':>11}"
          f"{'entropy':>9}")
    is_after_first = torch.ones_like(story, dtype=torch.bool)
    is_after_first[:, 0] = False
    show_row("the story", net, story, is_after_first)
    for temperature in (1.0, 0.7, 0.0):
        sampling = SamplingConfig(temperature)
        prompt = torch.full((16, 1), tok.bos)
        u = uniforms(0, 0, range(16), (65, 1))
        rule = reveal.parse("static:1")
        text = opdlm.rollout(Denoiser(net, masks.AR), prompt, 64, rule, u, tok.eot, sampling)
        show_row(f"AR samples, temperature {temperature}", net, text.tokens, text.response_mask)
    silly = torch.full((1, 65), tok.encode("r")[0])
    silly[:, 0] = tok.bos
    is_after_first = torch.ones_like(silly, dtype=torch.bool)
    is_after_first[:, 0] = False
    show_row('"rrrrrrrrr..."', net, silly, is_after_first)


if __name__ == "__main__":
    demonstration()

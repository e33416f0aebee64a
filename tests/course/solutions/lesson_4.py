"""Lesson 4: a KV cache for block diffusion, and a reveal rule.

    python course/04_cache_and_reveal_rules/exercise.py       the demonstration at the end of this file
    python course/check.py 4                                  the laws

Write the two functions of part 1. Everything else is given.

Shapes: B rows, T positions, K block size, V vocabulary, W positions of one forward pass.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))    # the project's root

from course import given
from course.given import CachedModel

# 1. to write --------------------------------------------------------------------------------------

def threshold(level: float, confidence: Tensor, masked: Tensor) -> Tensor:
    """(B, K) bool: the positions of each row that are revealed now, a part of `masked` (B, K) bool.

    All masked positions whose `confidence` (B, K) is larger than `level`. If a row with masks has none, its
    most confident masked position. (In the project: decoding.reveal.threshold.)
    """
    confident = masked & (confidence > level)
    best = confidence.masked_fill(~masked, -torch.inf).argmax(-1, keepdim=True)
    fallback = torch.zeros_like(masked).scatter(-1, best, True) & masked
    return confident | fallback


def block_logits(model: CachedModel, tokens: Tensor, start: int) -> Tensor:
    """(W, V) logits that predict the tokens at start .. start + W - 1, by one forward pass with a cache.

    `tokens` (T,) has finished text before `start`, then a block of model.layout.block tokens, some masked.
    The last block ends at model.end: W is the block size, or less.

    model.forward(tokens, first, last, start) is the forward pass (course/given.py). Choose `first` as large
    as possible: all finished text that the cache does not have yet must be processed, and every position
    whose logits are read. Logits at i - model.layout.logit_shift predict token i. Then set model.written, so
    that the next call knows how much *finished* text the cache has.
    """
    shift = model.layout.logit_shift
    first = min(model.written, start - shift)
    last = min(start + model.layout.block, model.end)
    logits = model.forward(tokens, first, last, start)
    model.written = start
    source = torch.arange(start, last) - shift
    return logits[source - first]


# 2. given: the demonstration ----------------------------------------------------------------------

@torch.no_grad()
def demonstration() -> None:
    """The same prompt under several thresholds: cost, and how the story changes."""
    net, layout, tok = given.pretrained()
    prompt = given.encode(tok, "Once upon a time")[0]
    length = 64
    for level in (1.0, 0.9, 0.5, 0.2):
        model = CachedModel(net, layout, len(prompt), len(prompt) + length)

        def rule(confidence: Tensor, masked: Tensor, level: float = level) -> Tensor:
            return threshold(level, confidence, masked)

        tokens = given.decode(model, prompt, rule, block_logits)
        log_probs = net(tokens[None]).log_softmax(-1)                        # read as an AR model
        nats = -log_probs[:-1].gather(-1, tokens[1:, None])[len(prompt) - 1:].mean()
        uncached = model.forwards * len(tokens)
        print(f"threshold {level}: {length / model.forwards:.2f} tokens per forward pass, "
              f"{nats:.2f} nats per token, {model.positions / length:.1f} positions per token "
              f"(without a cache {uncached / length:.1f})")
        print(f"    {tok.decode(tokens[len(prompt):].tolist())!r}")


if __name__ == "__main__":
    demonstration()

"""Lesson 3: from an AR model to a block-diffusion model: the mask, the shift, two streams.

    python course/03_from_ar_to_block/exercise.py             the demonstration at the end of this file
    python course/check.py 3                                  the laws

Write the two functions of part 1. Everything else is given.

Shapes: T positions, P prompt, R = T - P response, K block size, N positions to predict.
The input of a training pass has T + R columns: column c < T is the clean token at position c, column T + r is
the noisy token at position P + r.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))    # the project's root

from course import given
from model.masks import AR, Layout

# 1. to write --------------------------------------------------------------------------------------

def training_mask(length: int, prompt_len: int, layout: Layout) -> Tensor:
    """(T + R, T + R) bool, queries by keys: True where the query column may attend to the key column.

    `length` is T, `prompt_len` is P. Blocks are counted from the end of the prompt: positions P .. P + K - 1
    are block 0, those before them block -1, and so on. A last block may be shorter.

        clean query, clean key    the key's block is not later than the query's, in blocks of
                                  layout.context_block tokens (1: causal, as an AR model)
        clean query, noisy key    never
        noisy query, clean key    the key is in a block before the query's, in blocks of layout.block
        noisy query, noisy key    the same block
    """
    raise NotImplementedError("write me: training_mask")


def source_column(position: Tensor, length: int, prompt_len: int, layout: Layout) -> Tensor:
    """(N,) the columns whose logits predict the tokens at `position` (N,), positions from P to T - 1.

    Logits at position i - layout.logit_shift predict token i. They are read in the noisy stream if position
    i - layout.logit_shift is in the block of i, else in the clean stream.
    """
    raise NotImplementedError("write me: source_column")


# 2. given: the demonstration ----------------------------------------------------------------------

def nats(logits: Tensor, tokens: Tensor) -> float:
    """The mean nats per response token."""
    log_probs = logits.log_softmax(-1)
    return -log_probs.gather(-1, tokens[:, -logits.size(1):, None]).mean().item()


@torch.no_grad()
def demonstration() -> None:
    """A story, read by the shipped model: as an AR model, with all blocks masked, and without the shift."""
    net, layout, tok = given.pretrained()
    tokens = given.encode(tok)
    P = 4
    K = layout.block
    masked = torch.ones(1, tokens.size(1) - P, dtype=torch.bool)
    no_shift = Layout(K, layout.context_block, logit_shift=0)
    rows = {
        "block size 1, an AR model": AR,
        f"block size {K}, all blocks masked": layout,
        "the same, read without the shift": no_shift,
    }
    for name, row_layout in rows.items():
        logits = given.two_stream_logits(net, tokens, masked, row_layout, training_mask, source_column)
        print(f"{name:34} {nats(logits, tokens):.3f} nats per token")


if __name__ == "__main__":
    demonstration()

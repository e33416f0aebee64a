"""Attention masks. Every mask is a bool tensor of queries by keys; True means "may attend".

Three integers describe the attention pattern of a model (paper, section 4). An AR model has 1, 1, 1; the
student of this project 4, 1, 1, so that a conversion changes one integer; the paper's student 4, 4, 0.

Shapes: B rows, T positions, P prompt, R = T - P response, K block size, C clean positions, W positions of one
forward pass, S cache slots.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = {"ar": 1, "paper": 0}


@dataclass(frozen=True)
class Layout:
    """The attention pattern of a student, the same in sampler and trainer."""
    block: int = 4          # K, tokens denoised together
    context_block: int = 1  # finished text attends to itself in blocks of this size: 1 causal, K the paper's
    logit_shift: int = 1    # logits at position i - logit_shift predict token i: 1 as in AR, 0 the paper's

    @classmethod
    def of(cls, block: int, align: str, context: str) -> "Layout":
        """From the values of --block, --align and --context."""
        context_block = {"causal": 1, "block": block}[context]
        return cls(block, context_block, ALIGN[align])

    @property
    def is_ar_model(self) -> bool:
        """Whether a student of this layout reads finished text as an AR model does, and predicts as one."""
        return (self.context_block, self.logit_shift) == (1, 1)


AR = Layout(block=1)        # an AR model is a layout like any other


def block_of(position, prompt_len, block):
    """The block of a position, counted from the end of the prompt: 0, 1, ...; in the prompt -1, -2, ..."""
    return (position - prompt_len) // block


def context_mask(length: int, prompt_len: int, block: int, device=None) -> Tensor:
    """(T, T): finished text. Both ways within a block and causal between blocks; block 1 is an AR model."""
    block_index = block_of(torch.arange(length, device=device), prompt_len, block)
    return block_index[None, :] <= block_index[:, None]


def training_mask(length: int, prompt_len: int, layout: Layout, device=None,
                  upto: int | None = None) -> Tensor:
    """(C + R, C + R): one training pass over [clean text | noisy response] (BD3LM; paper, section 4).

    C is the length of the clean text: all T positions, or the first `upto`. The mask has four parts:

        queries      keys: clean text                   keys: noisy response
        clean        context_mask                       nothing
        noisy        the blocks before its own          its own block, both ways

    So a noisy block sees what a sampler sees that has finished the earlier blocks and works on this one.
    """
    C = length if upto is None else upto
    block_index = block_of(torch.arange(length, device=device), prompt_len, layout.block)
    clean_block = block_index[:C]                                            # (C,)
    noisy_block = block_index[prompt_len:]                                   # (R,)
    clean_to_clean = context_mask(C, prompt_len, layout.context_block, device)
    clean_to_noisy = torch.zeros(C, len(noisy_block), dtype=torch.bool, device=device)
    noisy_to_clean = clean_block[None, :] < noisy_block[:, None]             # (R, C)
    noisy_to_noisy = noisy_block[None, :] == noisy_block[:, None]            # (R, R)
    clean_rows = torch.cat([clean_to_clean, clean_to_noisy], 1)
    noisy_rows = torch.cat([noisy_to_clean, noisy_to_noisy], 1)
    return torch.cat([clean_rows, noisy_rows], 0)


def sampler_mask(position: Tensor, noisy: Tensor, prompt_len: Tensor, end: Tensor, layout: Layout,
                 slots: int) -> Tensor:
    """(B, 1, W, S): one forward pass of the sampler. Cache slot s holds the token at position s.

    `position`, `noisy` (B, W): the position of each query, and whether it is in the block being denoised.
    `prompt_len`, `end` (B,): where each response begins and where it must stop.
    """
    key = torch.arange(slots, device=position.device)                        # (S,)
    block = torch.where(noisy, layout.block, layout.context_block)[..., None]    # (B, W, 1)
    start = prompt_len[:, None, None]
    query_block = block_of(position[..., None], start, block)                # (B, W, 1)
    key_block = block_of(key, start, block)                                  # (B, W, S)
    allowed = (key_block <= query_block) & (key < end[:, None, None])
    return allowed[:, None]                                                  # (B, 1, W, S)

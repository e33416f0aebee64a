"""Who may look at whom. Every mask is a bool tensor of queries by keys; True means "may look".

Three integers say how a model is wired (paper section 4): how many tokens are denoised together, in blocks of what size
finished text attends to itself, and how far before a slot its logits stand. An AR model is 1, 1, 1; the student here
4, 1, 1, so that to convert is to change an integer; the paper's is 4, 4, 0.
Letters: B rows, T positions, P prompt, R = T - P response, K block, W positions of one forward, S cache slots."""
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = {"ar": 1, "paper": 0}


@dataclass(frozen=True)
class Layout:
    """How a student is wired; one for sampler and trainer, so that a training state is a state the sampler visits."""
    block: int = 4          # K, tokens denoised together
    clean_block: int = 1    # finished text attends to itself in blocks of this size: 1 is causal, K the paper's
    shift: int = 1          # the logits at position i - shift are about token i: 1 is the AR's way, 0 the paper's

    @classmethod
    def of(cls, block: int, align: str, context: str) -> "Layout":
        return cls(block, {"causal": 1, "block": block}[context], ALIGN[align])


AR = Layout(block=1)        # the autoregressive model is a layout like any other


def block_of(position, prompt, block):
    """Blocks are counted from the prompt's end: the response has 0, 1, ..., the prompt, read backwards, -1, -2, ..."""
    return (position - prompt) // block


def clean(length: int, prompt: int, block: int, device=None) -> Tensor:
    """(T, T): finished text, both ways within a block and causal between blocks; block 1: the AR model's mask."""
    blocks = block_of(torch.arange(length, device=device), prompt, block)
    return blocks[None, :] <= blocks[:, None]


def two_stream(length: int, prompt: int, layout: Layout, device=None, upto: int | None = None) -> Tensor:
    """(C+R, C+R): the training pass over [clean text | noisy response] (BD3LM's mask, paper section 4), C the T tokens
    of the clean text or the first `upto`. Clean text never sees the noisy stream. A noisy block sees itself, both ways,
    and the clean text before it: what a sampler sees that has written the earlier blocks and is at work on this one."""
    C, block = length if upto is None else upto, block_of(torch.arange(length, device=device), prompt, layout.block)
    keys, slots = block[:C], block[prompt:]                                             # (C,), (R,)
    to_clean, to_noisy = keys[None, :] < slots[:, None], slots[None, :] == slots[:, None]
    text = clean(C, prompt, layout.clean_block, device)                                 # (C, C)
    blind = torch.zeros(C, length - prompt, dtype=torch.bool, device=device)            # (C, R)
    return torch.cat([torch.cat([text, blind], 1), torch.cat([to_clean, to_noisy], 1)], 0)


def cached(position: Tensor, noisy: Tensor, prompt: Tensor, end: Tensor, layout: Layout, slots: int) -> Tensor:
    """(B, 1, W, S): one forward of the sampler. `position`, `noisy` (B, W): where a query stands, and is it denoised;
    `prompt`, `end` (B,): where a response begins and must stop. Cache slot s holds the token at position s."""
    key = torch.arange(slots, device=position.device)
    block = torch.where(noisy, layout.block, layout.clean_block)[..., None]             # (B, W, 1)
    prompt = prompt[:, None, None]
    sees = block_of(key, prompt, block) <= block_of(position[..., None], prompt, block)
    return (sees & (key < end[:, None, None]))[:, None]                                 # (B, 1, W, S)

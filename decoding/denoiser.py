"""The cached denoiser: the logits of opdlm.PlainDenoiser for less work.

The cache holds the keys and values of every transformer block; those of position i of a row are in slot i.
Finished text (the prompt and the finished blocks) does not change, so it is written once. The slots of the
current block are overwritten at each step. When the block is finished they are written a last time, because
what they hold was computed while some of its tokens were masks.

One forward pass does both: it writes the finished text that the cache does not hold yet, and it denoises the
block after it. For a prompt of 3 tokens (p), blocks of 4, two tokens revealed per step, and masks (_):

    pass 1      p p p | _ _ _ _                     writes the prompt, denoises block 1
    pass 2              _ a b _                     denoises block 1
    pass 3              c a b d | _ _ _ _           writes block 1, denoises block 2
    pass 4                        _ _ e f           denoises block 2

Every transformer block writes its keys and values to the cache before it computes attention, so in pass 3
block 2 attends to block 1 as written by the same pass. No pass is spent on writing a finished block alone:
N tokens, revealed one per step, cost at most N forward passes.

What is skipped, since it cannot change any logits:
    - finished rows; they leave the batch
    - rows whose block is the same as at the last step; their last logits are returned again
    - the logits of a block's first slot, after the block's first step, if logit_shift = 1: they are read at
      the last position of the finished text
    - the block itself, if no logits are read in it: an AR model (block = 1, logit_shift = 1) processes one
      position per token

Shapes: B rows, n of them in the cache, T positions, K block size, V vocabulary, N logits computed, W columns
of a forward pass, S cache slots.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from model.gpt import Cache
from model.masks import Layout, sampler_mask


@dataclass
class Plan:
    """A forward pass, except its tokens. It can be used again as long as `start` and `active` stay the same.

    Each of the n rows has W columns: first the finished text that the cache does not hold yet, then the
    block. Rows with less finished text are padded, and so are all columns of rows that are not active.
    """
    start: Tensor           # (B,) where each row's block begins
    active: Tensor          # (B,) bool: rows that take part
    position: Tensor        # (n, W) position of each column; 0 in the padding
    mask: Tensor            # (n, 1, W, S) attention mask
    cache_index: Tensor     # (n * W,) where the keys and values of each column are written
    read: Tensor            # (B, K) the column with the logits of each slot, an index into n * W
    forwards: Tensor        # (B,) forward passes that it costs: 0 or 1
    positions: Tensor       # (B,) positions that it costs
    writes_text: bool       # whether it writes finished text; such a plan is used once

    def fits(self, start: Tensor, active: Tensor) -> bool:
        return torch.equal(start, self.start) and torch.equal(active, self.active)


class Denoiser:
    """A network with a cache. `forwards` and `positions` (B,) count what each row has cost since `reset`."""

    def __init__(self, net, layout: Layout):
        self.net = net
        self.layout = layout
        self.mask_id = net.mask_id

    def reset(self, prompt_len: Tensor, end: Tensor) -> None:
        """Start new rows. `prompt_len`, `end` (B,): where each response begins and where it must stop."""
        B = len(prompt_len)
        device = prompt_len.device
        self.prompt_len = prompt_len
        self.end = end
        self.slot = torch.arange(self.layout.block, device=device)  # (K,) positions within a block
        self.read_in_block = self.slot >= self.layout.logit_shift  # (K,) the other logits are before it

        self.padding_slot = int(end.max())                   # the cache slot that padding is written to
        self.cache = [Cache(self.padding_slot) for _ in self.net.h]
        self.rows = torch.arange(B, device=device)           # (n,) rows that the cache holds
        self.written = torch.zeros_like(prompt_len)          # (B,) finished tokens in the cache

        self.plan = None
        self.logits = None  # (B, K, V) the last ones of each slot, for the masks `self.masked` (B, K)
        self.masked = torch.zeros(B, len(self.slot), dtype=torch.bool, device=device)
        self.forwards = torch.zeros_like(prompt_len)
        self.positions = torch.zeros_like(prompt_len)

    def __call__(self, tokens: Tensor, start: Tensor, masked: Tensor,
                 requested: Tensor | None = None) -> Tensor:
        """(B, K, V) logits of positions start .. start + K - 1 of `tokens` (B, T), valid where `masked`.

        With `requested` (B,) bool they are valid in these rows only; the other rows cost nothing.
        """
        # Logits are computed for masked slots: in a new block for all of them, later for those that are
        # read in the block, if it has changed. Revealed tokens stay, so the masks tell whether it has.
        is_new_block = (start > self.written)[:, None]       # (B, 1)
        is_changed = (masked != self.masked).any(1, keepdim=True)  # (B, 1)
        to_compute = masked & (is_new_block | (is_changed & self.read_in_block))  # (B, K)
        if requested is not None:
            to_compute = to_compute & requested[:, None]
        active = to_compute.any(1)                           # (B,)
        if not active.any():
            return self.logits

        if self.plan is None or not self.plan.fits(start, active):
            self.drop_finished(~masked.any(1))
            self.plan = self.make_plan(start, active, to_compute)
        index = to_compute.nonzero(as_tuple=True)            # rows and slots, (N,) each
        logits = self.forward(tokens, index)                 # (N, V)
        if self.logits is None:
            self.logits = logits.new_zeros(*masked.shape, logits.size(-1))
        self.logits[index] = logits
        self.masked = torch.where(active[:, None], masked, self.masked)
        return self.logits

    def make_plan(self, start: Tensor, active: Tensor, to_compute: Tensor) -> Plan:
        """The next forward pass of the rows `active` (B,), whose blocks begin at `start` (B,)."""
        r = self.rows
        device = start.device

        # Columns 0 .. width - 1: the finished text that the cache does not hold yet.
        missing = torch.where(active, start - self.written, 0)[r]  # (n,)
        width = int(missing.max())
        nth = torch.arange(width, device=device)
        text = self.written[r, None] + nth                   # (n, width)
        text_used = nth < missing[:, None]                   # False in the padding

        # Columns width .. width + K - 1: the current block, unless all logits are read in the finished text.
        block = start[r, None] + self.slot                   # (n, K)
        block_used = (block < self.end[r, None]) & active[r, None]
        if not (to_compute & self.read_in_block).any():
            block = block[:, :0]
            block_used = block_used[:, :0]

        used = torch.cat([text_used, block_used], 1)         # (n, W)
        position = torch.cat([text, block], 1).where(used, 0)  # (n, W)
        n, W = position.shape
        column = torch.arange(W, device=device)
        in_block = (column >= width).expand(n, W)
        num_slots = int(position.max()) + 1                  # S
        mask = sampler_mask(position, in_block, self.prompt_len[r], self.end[r], self.layout, num_slots)
        cache_slot = position.where(used, self.padding_slot)
        cache_index = self.cache[0].flat_index(cache_slot)

        # The logits of a slot are read `logit_shift` columns before its own. Those of a first slot may be
        # read in the row's last column of finished text; in some rows padding is between it and the block.
        block_column = torch.where(self.read_in_block, width, missing[:, None])  # (n, K)
        read = block_column + self.slot - self.layout.logit_shift
        first_of_row = torch.arange(n, device=device)[:, None] * W
        read = read + first_of_row

        read = self.for_all_rows(read)
        forwards = self.for_all_rows(used.any(1).long())
        positions = self.for_all_rows(used.sum(1))
        writes_text = width > 0
        return Plan(start, active, position, mask, cache_index, read, forwards, positions, writes_text)

    def for_all_rows(self, x: Tensor) -> Tensor:
        """(B, ...): x (n, ...) in the rows that the cache holds, 0 in the others."""
        zeros = x.new_zeros(len(self.end), *x.shape[1:])
        return zeros.index_put((self.rows,), x)

    def forward(self, tokens: Tensor, index: tuple[Tensor, Tensor]) -> Tensor:
        """(N, V) logits of N slots, given as (rows, slots): one forward pass, as planned."""
        plan = self.plan
        self.forwards = self.forwards + plan.forwards
        self.positions = self.positions + plan.positions
        if plan.writes_text:
            self.written = torch.where(plan.active, plan.start, self.written)
            self.plan = None
        if len(self.rows) < len(tokens):
            tokens = tokens[self.rows]
        tokens = tokens.gather(1, plan.position)             # (n, W)
        read = plan.read[index]                              # (N,)
        return self.net(tokens, plan.mask, plan.position, read, self.cache, plan.cache_index)

    def drop_finished(self, finished: Tensor) -> None:
        """Remove the rows `finished` (B,) from the cache. This copies it, so it is done for many at once."""
        finished = finished[self.rows]                       # (n,)
        if finished.sum() * 4 >= len(finished):
            for cache in self.cache:
                cache.keep_rows(~finished)
            self.rows = self.rows[~finished]

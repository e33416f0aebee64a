"""What a sampler needs of a network: the logits at the slots of the block under work, each row's block its own.

One forward does all that is due: it writes the finished text that the cache has not got yet (the prompt, or the block
just finished) and denoises the block after it. So N tokens, one a step, cost at most N forwards: there is no commit of
its own.

Letters: B rows, n of them with work left, K block, T positions, V vocabulary, W positions of one forward: the finished
text to be written, then the block.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from model.gpt import Cache
from model.masks import Layout, sampler_mask


@dataclass
class Plan:
    """One forward, but for the tokens: what stays as it is while a block is denoised."""
    key: tuple              # starts and who is awaited, (B,) each: what it was made from
    position: Tensor        # (n, W)
    mask: Tensor            # (n, 1, W, S)
    at: Tensor              # (n * W,) places in the cache
    place: Tensor           # (B, K) where a slot's logits stand, an index into the n * W
    cost: tuple             # forwards and positions, (B,) each
    writes: bool            # finished text, which is done once


class Denoiser:
    """A network and its cache. `forwards` and `positions` (B,) count what each row has cost since `open`."""

    def __init__(self, net, layout: Layout):
        self.net, self.layout, self.mask_id = net, layout, net.mask_id

    def reset(self, prompt: Tensor, end: Tensor) -> None:
        """Begin with new rows. `prompt`, `end` (B,): where a row's response begins and where it must stop."""
        self.prompt, self.end, self.logits, self.plan = prompt, end, None, None
        self.dump = int(end.max())                                                      # the cache's slot for padding
        self.cache = [Cache(self.dump) for _ in self.net.h]
        self.rows = torch.arange(len(prompt), device=prompt.device)                     # (n,) whose text it holds
        self.slot = torch.arange(self.layout.block, device=prompt.device)               # (K,)
        self.inside = self.slot >= self.layout.logit_shift                          # (K,) whose logits stand in the block
        self.written = torch.zeros_like(prompt)                                         # (B,) how much of it
        self.masked = torch.zeros_like(self.slot.expand(len(prompt), -1), dtype=torch.bool)     # (B, K) logits are of
        self.forwards, self.positions = torch.zeros_like(prompt), torch.zeros_like(prompt)

    def __call__(self, tokens: Tensor, start: Tensor, masked: Tensor, asked: Tensor | None = None) -> Tensor:
        """(B, K, V) logits about the slots start .. start + K - 1 of each row of `tokens` (B, T), valid where `masked`
        (B, K); if not all rows are `asked` (B,), in these.

        Logits that stand in finished text (a first slot's, if the layout shifts) are made once a block: nothing changes
        them. A row without work, since no mask is left or none whose logits could have changed, costs nothing.
        """
        work = masked if asked is None else masked & asked[:, None]                     # (B, K)
        changed = (masked != self.masked).any(1, keepdim=True) & self.inside            # a token shown stays as it is
        wanted = work & ((start > self.written)[:, None] | changed)                     # (B, K)
        key = start, wanted.any(1)
        if not key[1].any():
            return self.logits
        if self.plan is None or not all(map(torch.equal, key, self.plan.key)):
            self.drop(masked.any(1))
            self.plan = self.planned(key, wanted)
        at = wanted.nonzero(as_tuple=True)                                              # (N,) twice: rows, slots
        made = self.forward(tokens, at)                                                 # (N, V)
        if self.logits is None:
            self.logits = made.new_zeros(*masked.shape, made.size(-1))                  # (B, K, V)
        self.logits[at] = made
        self.masked = masked if asked is None else torch.where(key[1][:, None], masked, self.masked)
        return self.logits

    def planned(self, key: tuple, wanted: Tensor) -> Plan:
        """For the n rows that are left. `wanted` (B, K)."""
        r, shift, (start, awaited) = self.rows, self.layout.logit_shift, key
        late = torch.where(awaited, start - self.written, 0)[r]                         # (n,) finished but not written
        width, written, here = int(late.max()), self.written[r, None], start[r, None] + self.slot
        clean = written + torch.arange(width, device=here.device)                       # (n, width)
        # in a block of one slot, shifted, nobody reads or sees the slot itself: then AR text costs one position a token
        noisy = here if (wanted & self.inside).any() else here[:, :0]                   # (n, K) or none
        position = torch.cat([clean, noisy], 1)                                         # (n, W)
        used = torch.cat([clean < written + late[:, None], (noisy < self.end[r, None]) & awaited[r, None]], 1)
        position = torch.where(used, position, 0)                                       # the others are padding
        denoised = (torch.arange(position.size(1), device=here.device) >= width).expand_as(position)
        mask = sampler_mask(position, denoised, self.prompt[r], self.end[r], self.layout, int(position.max()) + 1)
        at = self.cache[0].flat_index(torch.where(used, position, self.dump))
        place = torch.where(self.inside, width, late[:, None]) + self.slot - shift              # (n, K) in its row
        place = place + torch.arange(len(r), device=here.device)[:, None] * position.size(1)
        place, *cost = (start.new_zeros(len(start), *x.shape[1:]).index_put((r,), x)
                        for x in (place, used.any(1).long(), used.sum(1)))
        return Plan(key, position, mask, at, place, tuple(cost), width > 0)

    def forward(self, tokens: Tensor, at: tuple) -> Tensor:
        """(N, V): one pass, read `at` rows and slots, (N,) each."""
        plan, (forwards, positions) = self.plan, self.plan.cost
        self.forwards, self.positions = self.forwards + forwards, self.positions + positions
        if plan.writes:
            (start, awaited), self.plan = plan.key, None
            self.written = torch.where(awaited, start, self.written)
        tokens = tokens if len(self.rows) == len(tokens) else tokens[self.rows]
        return self.net(tokens.gather(1, plan.position), plan.mask, plan.position, plan.place[at], self.cache,
                        plan.at)

    def drop(self, working: Tensor) -> None:
        """Forget the rows that have finished, several at a time, since it copies the cache. `working` (B,)."""
        idle = ~working[self.rows]
        if idle.sum() * 4 >= len(idle):
            for cache in self.cache:
                cache.keep_rows(~idle)
            self.rows = self.rows[~idle]

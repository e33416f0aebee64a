"""What a sampler needs of a network: the logits at the slots of the block under work, each row's block its own.

One forward does all that is due: it writes the finished text that the cache has not got yet (the prompt, or the block
just finished) and denoises the block after it. So N tokens, one a step, cost at most N forwards: there is no commit of
its own.

Letters: B rows, n of them with work left, K block, T positions, V vocabulary, W positions of one forward: the finished
text to be written, then the block.
"""
import torch
from torch import Tensor

from model.gpt import Cache
from model.masks import Layout, cached


class Denoiser:
    """A network and its cache. `forwards` and `positions` (B,) count what each row has cost since `open`."""

    def __init__(self, net, layout: Layout):
        self.net, self.layout, self.mask_id = net, layout, net.mask_id

    def open(self, prompt: Tensor, end: Tensor) -> None:
        """Begin with new rows. `prompt`, `end` (B,): where a row's response begins and where it must stop."""
        self.prompt, self.end, self.logits = prompt, end, None
        self.dump = int(end.max())                                                      # the cache's slot for padding
        self.cache = [Cache(self.dump) for _ in self.net.h]
        self.rows = torch.arange(len(prompt), device=prompt.device)                     # (n,) whose text it holds
        self.written = torch.zeros_like(prompt)                                         # (B,) how much of it
        self.forwards, self.positions = torch.zeros_like(prompt), torch.zeros_like(prompt)

    def __call__(self, tokens: Tensor, start: Tensor) -> Tensor:
        """(B, K, V) logits about the slots start .. start + K - 1 of each row of `tokens` (B, T), valid under masks.

        Logits that stand in finished text (a first slot's, if the layout shifts) are made once a block: nothing changes
        them. A row without work, since no mask is left or none whose logits could have changed, costs nothing.
        """
        slot = torch.arange(self.layout.block, device=tokens.device)                    # (K,)
        here = start[:, None] + slot                                                    # (B, K)
        masked = (tokens.gather(1, here) == self.mask_id) & (here < self.end[:, None])
        late = torch.where(masked.any(1), start - self.written, 0)                      # (B,) finished but not written
        wanted = masked & ((slot >= self.layout.shift) | (late > 0)[:, None])           # (B, K)
        if wanted.any():
            self.drop(masked.any(1))
            r = self.rows
            made = self.forward(tokens[r], here[r], late[r], wanted[r], r)               # (N, V)
            if self.logits is None:
                self.logits = made.new_zeros(*here.shape, made.size(-1))                # (B, K, V)
            self.logits[wanted] = made
            self.written = self.written + late
        return self.logits

    def forward(self, tokens, here, late, wanted, r) -> Tensor:
        """(N, V): one pass for the n rows `r`, read where `wanted` (n, K)."""
        shift, width = self.layout.shift, int(late.max())
        slot = torch.arange(here.size(1), device=here.device)
        clean = self.written[r, None] + torch.arange(width, device=here.device)         # (n, width)
        # in a block of one slot, shifted, nobody reads or sees the slot itself: then AR text costs one position a token
        noisy = here if (wanted & (slot >= shift)).any() else here[:, :0]               # (n, K) or none
        position = torch.cat([clean, noisy], 1)                                         # (n, W)
        finished = clean < (self.written[r] + late)[:, None]
        awaited = (noisy < self.end[r, None]) & wanted.any(1, keepdim=True)
        used = torch.cat([finished, awaited], 1)                                        # (n, W) the others are padding
        self.forwards[r] += used.any(1)
        self.positions[r] += used.sum(1)
        position = torch.where(used, position, 0)
        denoised = (torch.arange(position.size(1), device=here.device) >= width).expand_as(position)
        mask = cached(position, denoised, self.prompt[r], self.end[r], self.layout, int(position.max()) + 1)
        place = torch.where(slot >= shift, width, late[:, None]) + slot - shift         # (n, K) where its logits stand
        read = (torch.arange(len(r), device=here.device)[:, None] * position.size(1) + place)[wanted]
        at = torch.where(used, position, self.dump)
        return self.net(tokens.gather(1, position), mask, position, read, self.cache, at)

    def drop(self, working: Tensor) -> None:
        """Forget the rows that have finished, several at a time, since it copies the cache. `working` (B,)."""
        idle = ~working[self.rows]
        if idle.sum() * 4 >= len(idle):
            for cache in self.cache:
                cache.keep(~idle)
            self.rows = self.rows[~idle]

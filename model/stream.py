"""What a verifier needs of a network: a cached pass over text of which the end may be taken back, with a block of masks
behind each place where the text may turn out to end (TiDAR, 2511.08923). See model/verify.py.

Letters: B rows, T positions, K block, C width, A drafts to verify, W positions of the clean text in one forward,
M = (A + 1) K of masks, S cache slots.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from model.dist import inference
from model.gpt import Cache


class Stream:
    """A network's cached pass over text of which the end may be taken back, and over masks that it never keeps.
    `forwards` and `positions` (B,) count what each row has cost."""

    def __init__(self, net, block: int, begin: Tensor, end: Tensor):
        """`block`: of the masks, 0 for none. `begin`, `end` (B,): where responses begin and must stop."""
        self.net, self.block, self.end, self.scratch, self.begun = net, block, end, block * block, False
        self.cache = [Cache(self.scratch + int(end.max())) for _ in net.h]              # masks, then text, then a dump
        self.forwards, self.positions = torch.zeros_like(begin), torch.zeros_like(begin)

    def __call__(self, tokens: Tensor, size: Tensor, drafts: int, working: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Push the first `size` (B,) of `tokens` (B, T), all but what is written, the `drafts` (A) behind them, masks.

        Hidden states (B, A + 1, C) about the tokens at size .. size + A; those of the masks behind a = 0 .. A accepted
        drafts, (B, A + 1, K - 1, C), about the tokens at size + a + 1 and on; and what makes logits of both.
        """
        B, K, A, device = len(size), self.block, drafts, size.device
        written = size - 1 if self.begun else 0 * size                     # an accepted draft was pushed to be verified
        late = torch.where(working, size + A - written, 0)                              # (B,)
        clean = written[:, None] + torch.arange(int(late.max()), device=device)         # (B, W)
        behind = size[:, None] + torch.arange(A + 1, device=device)                     # (B, A + 1) blocks begin there
        noisy = (behind[..., None] + torch.arange(K, device=device)).flatten(1)         # (B, M)
        slot, W = torch.arange(noisy.size(1), device=device), clean.size(1)
        used = torch.cat([clean < (written + late).minimum(self.end)[:, None],
                          (noisy < self.end[:, None]) & working[:, None]], 1)           # (B, W + M) others are padding
        position = torch.where(used, torch.cat([clean, noisy], 1), 0)
        pushed = torch.cat([tokens.gather(1, position[:, :W]), torch.full_like(noisy, self.net.mask_id)], 1)
        at = torch.cat([self.scratch + clean, slot.expand_as(noisy)], 1).masked_fill(~used, self.cache[0].slots)
        ahead = W + slot.view(1, A + 1, K)[..., :-1].flatten(1).expand(B, -1)
        read = torch.cat([(behind - 1 - written[:, None]).clamp(min=0), ahead], 1)      # (B, (A + 1) max(K, 1))
        read = read + torch.arange(B, device=device)[:, None] * position.size(1)
        with inference():
            hidden, table = self.net(pushed, self.mask(clean, noisy, behind), position, read.flatten(), self.cache,
                                     self.cache[0].place(at), head=lambda hidden, *table: (hidden, table))
        self.forwards, self.positions, self.begun = self.forwards + working, self.positions + used.sum(1), True
        hidden = hidden.view(B, -1, hidden.size(-1))
        return hidden[:, :A + 1], hidden[:, A + 1:].reshape(B, A + 1, max(K - 1, 0), hidden.size(-1)), table

    def mask(self, clean: Tensor, noisy: Tensor, behind: Tensor) -> Tensor:
        """(B, 1, W + M, S): text is causal; a mask sees the text before its block, and its block, both ways."""
        upto = min(int(torch.cat([clean, behind], 1).max()) + 1, self.cache[0].slots - self.scratch)
        text = torch.arange(upto, device=clean.device)                                  # the keys' positions
        sees = torch.cat([clean, behind.repeat_interleave(self.block, 1) - 1], 1)       # (B, W + M) up to which text
        block = torch.arange(noisy.size(1), device=clean.device) // max(self.block, 1)
        beside = (block[:, None] == block) & (noisy < self.end[:, None])[:, None, :]    # (B, M, M)
        beside = F.pad(beside, (0, self.scratch - noisy.size(1), clean.size(1), 0))     # (B, W + M, scratch)
        return torch.cat([beside, text <= sees[..., None]], 2)[:, None]

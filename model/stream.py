"""What a verifier needs of a network: a cached pass over text of which the end may be taken back, with a block of masks
behind each place where the text may turn out to end (TiDAR, 2511.08923). See model/verify.py.

Letters: B rows, T positions, K block, C width, A drafts to verify, W positions of the clean text in one forward,
M = (A + 1) K of masks, S cache slots.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.dist import inference
from model.gpt import Cache


@dataclass
class Form:
    """One forward, but for the tokens and for where each row's text ends: positions count from there. All forwards but
    the first have the same."""
    key: tuple              # how much of the text is pushed, and A
    position: Tensor        # (W + M,)
    noisy: Tensor           # (W + M,) which are masks
    slot: Tensor            # (W + M,) theirs in the cache
    sees: Tensor            # (W + M,) up to which text each sees
    beside: Tensor          # (W + M, M) and which masks
    read: Tensor            # (B (A + 1) max(K, 1),) whose hidden states are looked at, an index into B (W + M)

    @classmethod
    def of(cls, rows: int, back: int, drafts: int, block: int, device) -> "Form":
        """The last `back` tokens of the text, the drafts behind them, and a block of masks behind each number of them.
        """
        behind, inside = torch.arange(drafts + 1, device=device), torch.arange(block, device=device)
        clean, masks = torch.arange(-back, drafts, device=device), (behind[:, None] + inside).flatten()  # (W,), (M,)
        W, slot = len(clean), torch.arange(len(clean) + len(masks), device=device) - len(clean)         # (W + M,)
        ahead = W + slot[W:].view(drafts + 1, block)[:, :-1].flatten()     # about a block's own end nobody asks
        read = torch.cat([back - 1 + behind, ahead]) + torch.arange(rows, device=device)[:, None] * len(slot)
        which = slot[W:] // max(block, 1)                                               # (M,) its block
        return cls((back, drafts), torch.cat([clean, masks]), slot >= 0, slot,
                   torch.cat([clean, behind.repeat_interleave(block) - 1]),
                   F.pad(which[:, None] == which, (0, 0, W, 0)), read.flatten())


class Stream:
    """A network's cached pass over text of which the end may be taken back, and over masks that it never keeps.
    `forwards` and `positions` (B,) count what each row has cost."""

    def __init__(self, net, block: int, begin: Tensor, end: Tensor):
        """`block`: of the masks, 0 for none. `begin`, `end` (B,): where responses begin and must stop."""
        self.net, self.block, self.end, self.scratch, self.form = net, block, end, block * block, None
        self.cache = [Cache(self.scratch + int(end.max())) for _ in net.h]              # masks, then text, then a dump
        self.forwards, self.positions = torch.zeros_like(begin), torch.zeros_like(begin)

    def __call__(self, tokens: Tensor, size: Tensor, drafts: int, working: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Push of the first `size` (B,) of `tokens` (B, T) what is not written, the `drafts` (A) behind them, masks.

        Hidden states (B, A + 1, C) about the tokens at size .. size + A; those of the masks behind a = 0 .. A accepted
        drafts, (B, A + 1, K - 1, C), about the tokens at size + a + 1 and on; and what makes logits of both.
        """
        B, K, A = len(size), self.block, drafts
        back = int(size.max()) if self.form is None else 1                 # an accepted draft was pushed to be verified
        if self.form is None or self.form.key != (back, A):
            self.form = Form.of(B, back, A, K, size.device)
        form, position = self.form, size[:, None] + self.form.position                  # (B, W + M)
        used = (position >= 0) & (position < self.end[:, None]) & working[:, None]      # others are padding
        at = torch.where(form.noisy, form.slot, self.scratch + position)
        place = self.cache[0].place(torch.where(used, at, self.cache[0].slots))
        position = torch.where(used, position, 0)
        pushed = tokens.gather(1, position).masked_fill(form.noisy, self.net.mask_id)
        with inference():
            hidden, table = self.net(pushed, self.mask(size, used), position, form.read, self.cache, place,
                                     head=lambda hidden, *table: (hidden, table))
        self.forwards, self.positions = self.forwards + working, self.positions + used.sum(1)
        hidden = hidden.view(B, -1, hidden.size(-1))
        return hidden[:, :A + 1], hidden[:, A + 1:].reshape(B, A + 1, max(K - 1, 0), hidden.size(-1)), table

    def mask(self, size: Tensor, used: Tensor) -> Tensor:
        """(B, 1, W + M, S): text is causal; a mask sees the text before its block, and its block, both ways."""
        form, M = self.form, self.form.beside.size(1)
        upto = min(int(size.max()) + form.key[1], self.cache[0].slots - self.scratch)
        text = torch.arange(upto, device=size.device)                                   # the keys' positions
        sees = (size[:, None] + form.sees).clamp(min=0)                                 # (B, W + M), padding sees one
        beside = form.beside & used[:, None, used.size(1) - M:]                         # (B, W + M, M)
        return torch.cat([F.pad(beside, (0, self.scratch - M)), text <= sees[..., None]], 2)[:, None]

"""Lossless decoding: what diffusion drafts, an autoregressive model verifies; the text is the verifier's, sooner.

A block of masks behind the accepted text gives a draft of each of its tokens, all of one state, each from its own
distribution q. One causal pass over the drafts gives what the verifier would have drawn them from, p. From the left,
a draft is accepted with probability min(1, p / q); in place of the first that is not, a token comes from (p - q)+
(speculative sampling, 2211.17192). So the text has the verifier's distribution, whoever drafts; at temperature 0 it is
the verifier's, token for token.

The verifier may be the teacher: two forwards in turn, the student's and the teacher's. Or the student itself, which
under its causal mask is an AR model: then one forward verifies the drafts, and behind each number of them that may be
accepted stands a block of masks, to draft on from there (TiDAR, 2511.08923).

Letters: B rows, T positions, K block, V vocabulary, C width, A drafts to verify.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig, inverse_cdf
from model.gpt import Cache
from model.masks import Layout

DRAFT, ACCEPT, INSTEAD = range(3)       # what the three uniform numbers of a position are for


def accept(p: Tensor, q: Tensor, draft: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) how many drafts are accepted, and the token (B,) behind them. `p`, `q` (B, A + 1, V), `draft` (B, A + 1),
    `u` (B, A + 1, 3). Where nothing is drafted q is 0, and what comes in its place is drawn from p itself."""
    p_of, q_of = (x.gather(2, draft[..., None])[..., 0] for x in (p, q))                # (B, A + 1)
    kept = (q_of > 0) & (u[..., ACCEPT] * q_of < p_of)
    count = kept.cumprod(1).sum(1)                                                      # (B,) at most A
    row = torch.arange(len(p), device=p.device)
    rest = (p - q).clamp(min=0)[row, count]                                             # (B, V)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[row, count])             # p = q, but for rounding
    return count, inverse_cdf(rest, u[row, count, INSTEAD])


class SelfVerifier:
    """The student verifies its own drafts; one forward an iteration."""

    def __init__(self, student, layout: Layout, begin: Tensor, end: Tensor):
        if (layout.context_block, layout.logit_shift) != (1, 1):
            raise ValueError("a student that verifies itself must read finished text as an AR model does: convert it "
                             "with --align=ar --context=causal, or take its teacher as the verifier")
        block = layout.block * (layout.block > 1)                          # a block of one slot has nothing to draft
        self.stream, self.before = DraftStream(student, block, begin, end), None

    def __call__(self, tokens, size, working, u, sampling) -> tuple[Tensor, Tensor, Tensor]:
        """p, q (B, A + 1, V) and drafts (B, A + 1), the last of them none; `u` (B, K + 1, 3) of the positions from
        `size` on."""
        q, row = None, torch.arange(len(size), device=size.device)
        drafts = tokens[:, :0]
        if self.before is not None:
            before, ahead, table = self.before
            chosen = ahead[row, (size - before - 1).clamp(0, ahead.size(1) - 1)]        # (B, K - 1, C)
            q = warped(sampling, F.linear(chosen, *table))
            drafts = drawn(q, u)
            tokens = put(tokens, drafts, size)
        behind, ahead, table = self.stream(tokens, size, drafts.size(1), working)
        self.before = size, ahead, table
        p = warped(sampling, F.linear(behind, *table))
        return p, torch.zeros_like(p) if q is None else F.pad(q, (0, 0, 0, 1)), F.pad(drafts, (0, 1))

    @property
    def cost(self) -> tuple[Tensor, Tensor]:
        return self.stream.forwards, self.stream.positions


class TeacherVerifier:
    """The student drafts a block and the teacher verifies it; two forwards an iteration."""

    def __init__(self, student, layout: Layout, begin: Tensor, end: Tensor, teacher):
        self.drafter, self.stream, self.begin = Denoiser(student, layout), DraftStream(teacher, 0, begin, end), begin
        self.drafter.reset(begin, end)

    def __call__(self, tokens, size, working, u, sampling) -> tuple[Tensor, Tensor, Tensor]:
        """The same. A student that is causal between its blocks begins a block anywhere; the other fills up its own."""
        layout = self.drafter.layout
        done = (size - self.begin) % layout.block * (layout.context_block > 1) * working  # (B,) of the block
        self.drafter.prompt = size - done                                  # from where blocks are counted
        block = torch.arange(layout.block, device=size.device)
        masked = (block >= done[:, None]) & ((size - done)[:, None] + block < self.drafter.end[:, None])    # (B, K)
        logits = self.drafter(tokens, size - done, masked)                              # (B, K, V)
        slot = done[:, None] + block                                       # (B, K) of drafts, in the block
        place = slot.clamp(max=layout.block - 1)[..., None].expand(-1, -1, logits.size(-1))
        q = warped(sampling, logits.gather(1, place)) * (slot < layout.block)[..., None]
        drafts = drawn(q, u)
        behind, _, table = self.stream(put(tokens, drafts, size), size, layout.block, working)
        return warped(sampling, F.linear(behind, *table)), F.pad(q, (0, 0, 0, 1)), F.pad(drafts, (0, 1))

    @property
    def cost(self) -> tuple[Tensor, Tensor]:
        return self.drafter.forwards + self.stream.forwards, self.drafter.positions + self.stream.positions


def warped(sampling, logits: Tensor) -> Tensor:
    """(B, A, V) probabilities."""
    return sampling(logits.float().softmax(-1).flatten(0, 1)).view(logits.shape)


def drawn(q: Tensor, u: Tensor) -> Tensor:
    """(B, A): a draft of each position."""
    return inverse_cdf(q.flatten(0, 1), u[:, :q.size(1), DRAFT].flatten()).view(q.shape[:2])


def put(tokens: Tensor, some: Tensor, size: Tensor) -> Tensor:
    """`tokens` (B, T) with `some` (B, A) from `size` on."""
    return tokens.scatter(1, size[:, None] + torch.arange(some.size(1), device=size.device), some)


@torch.no_grad()
def verified(student, layout: Layout, prompt: Tensor, length: int, u: Tensor, eot: int, sampling: Callable = SamplingConfig(),
             teacher=None, prompt_len: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Text of the `teacher`'s distribution, or if there is none of the student's own as an AR model, after each row of
    `prompt` (B, P), up to `length` tokens, until an end-of-text. `u` (B, P + length, 3): uniform numbers.

    Tokens (B, P + length); the iteration in which each was accepted, -1 where none was; forwards and positions (B,).
    """
    B, P = prompt.shape
    size = torch.full((B,), P, device=prompt.device) if prompt_len is None else prompt_len       # (B,) accepted so far
    begin, end, turn = size, size + length, 0
    tokens, u = F.pad(prompt, (0, length + layout.block + 1)), F.pad(u, (0, 0, 0, layout.block + 1))
    tokens = tokens.masked_fill(torch.arange(tokens.size(1), device=size.device) >= size[:, None], student.mask_id)
    when, row = torch.full_like(tokens, -1), torch.arange(B, device=size.device)[:, None]
    slot = torch.arange(layout.block + 1, device=size.device)
    verifier = SelfVerifier(student, layout, begin, end) if teacher is None else TeacherVerifier(student, layout, begin, end, teacher)
    while (working := size < end).any():
        here = size[:, None] + slot                                                     # (B, K + 1)
        numbers = u[row, here]                                                          # (B, K + 1, 3)
        p, q, drafts = verifier(tokens, size, working, numbers, sampling)
        here, numbers = here[:, :drafts.size(1)], numbers[:, :drafts.size(1)]           # (B, A + 1)
        count, instead = accept(p, q, drafts, numbers)
        run = drafts.scatter(1, count[:, None], instead[:, None])                       # (B, A + 1)
        fits = (here <= (size + count)[:, None]) & (here < end[:, None])
        over = fits & (run == eot)
        fits &= over.cumsum(1) - over.long() == 0                                       # nothing behind an end-of-text
        tokens = tokens.scatter(1, here, torch.where(fits, run, student.mask_id))       # nothing stands there yet
        when = when.scatter(1, here, torch.where(fits, turn, -1))
        size = torch.where(over.any(1), end, (size + count + 1).minimum(end))
        turn += 1
    tokens, when = tokens[:, :P + length], when[:, :P + length]
    return tokens.masked_fill(tokens == student.mask_id, eot), when, *verifier.cost






@dataclass
class DraftLayout:
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
    def of(cls, rows: int, back: int, drafts: int, block: int, device) -> "DraftLayout":
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


class DraftStream:
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
            self.form = DraftLayout.of(B, back, A, K, size.device)
        form, position = self.form, size[:, None] + self.form.position                  # (B, W + M)
        used = (position >= 0) & (position < self.end[:, None]) & working[:, None]      # others are padding
        at = torch.where(form.noisy, form.slot, self.scratch + position)
        place = self.cache[0].flat_index(torch.where(used, at, self.cache[0].slots))
        position = torch.where(used, position, 0)
        pushed = tokens.gather(1, position).masked_fill(form.noisy, self.net.mask_id)
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

"""Lossless speculative decoding: diffusion drafts several tokens at once, an AR model verifies them.

The student puts a block of masks after the accepted text and drafts a token for each mask. All drafts come
from the same state, each from a distribution q of its own. One causal pass over the drafts then gives the
distributions p from which the verifier would have sampled these tokens. From the left, a draft is accepted
with probability min(1, p / q). The first rejected draft is replaced by a token sampled from (p - q)+, and the
drafts after it are dropped (speculative sampling, arXiv 2211.17192). So the text has the verifier's
distribution, whatever model drafts it. At temperature 0 it equals the verifier's text, token by token.

There are two verifiers:

    TeacherVerifier   The teacher. An iteration takes two forward passes: the student drafts, the teacher
                      verifies.
    SelfVerifier      The student itself, which is an AR model under its causal mask. An iteration takes one
                      forward pass: it verifies the drafts, and for each number of drafts that may be accepted
                      it already makes the next drafts (TiDAR, arXiv 2511.08923).

One pass of the SelfVerifier with block size K = 3, so with A = K - 1 = 2 drafts d1 and d2. The accepted text
has n tokens, at the positions 0 .. n - 1; all but the last one, x, are in the cache. M is a mask. `#` means
"may attend".

                              keys
    query    position         cache  x d1 d2   M M M   M M M   M M M    predicts
    x        n - 1              #    #  .  .   . . .   . . .   . . .    p of token n
    d1       n                  #    #  #  .   . . .   . . .   . . .    p of token n + 1
    d2       n + 1              #    #  #  #   . . .   . . .   . . .    p of token n + 2
    M M M    n .. n + 2         #    #  .  .   # # #   . . .   . . .    q of n + 1, n + 2: no draft accepted
    M M M    n + 1 .. n + 3     #    #  #  .   . . .   # # #   . . .    q of n + 2, n + 3: d1 accepted
    M M M    n + 2 .. n + 4     #    #  #  #   . . .   . . .   # # #    q of n + 3, n + 4: d1, d2 accepted

If `a` drafts are accepted, token n + a is sampled from (p - q)+, or from p after the last draft, and becomes
the next x. Block `a` of the masks begins at the position of this token and has drafts for the K - 1 tokens
after it; the other blocks are discarded. The last mask of a block is not read, since the logits at position
i - 1 predict token i.

Shapes: B rows, T positions, P prompt, K block size, V vocabulary, C width, A drafts to verify. In one forward
pass: W text positions (accepted tokens that are not in the cache, then drafts), M masks, S keys.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig, inverse_cdf, is_end, padding_id
from model.gpt import Cache, without_output_layer
from model.masks import Layout

DRAFT, ACCEPT, RESAMPLE = range(3)      # what the three random numbers of a position are used for

# 1. the loop: draft, verify, accept ------------------------------------------------------------------------


@dataclass
class SpeculativeText:
    """A text and the iterations in which its tokens were accepted."""
    tokens: Tensor          # (B, T) prompt and response, padded with end-of-text
    accepted_in: Tensor     # (B, T) iteration, from 0, that accepted a token; -1 outside the response
    forwards: Tensor        # (B,) forward passes spent on a row, those of drafter and verifier
    positions: Tensor       # (B,) positions processed in these passes


@torch.no_grad()
def speculative_decode(student, layout: Layout, prompt: Tensor, length: int, u: Tensor,
                       eot: int | tuple[int, ...], sampling: Callable = SamplingConfig(), teacher=None,
                       prompt_len: Tensor | None = None) -> SpeculativeText:
    """Generate up to `length` tokens after each row of `prompt` (B, P), until an end-of-text token.

    The text has the distribution of the `teacher`; without one, that of the student as an AR model. `u`
    (B, P + length, 3) holds uniform random numbers, three per position: DRAFT, ACCEPT, RESAMPLE. `eot` is the
    end-of-text token, or all of them.
    `prompt_len` (B,) gives the prompts' lengths where they differ.
    """
    B, P = prompt.shape
    K = layout.block
    T = P + length
    device = prompt.device
    row = torch.arange(B, device=device)[:, None]                # (B, 1) for indexing
    offset = torch.arange(K + 1, device=device)                  # at most K drafts, and one more token
    if prompt_len is None:
        prompt_len = torch.full((B,), P, device=device)
    end = prompt_len + length                                    # (B,)
    if teacher is None:
        verifier = SelfVerifier(student, layout, prompt_len, end)
    else:
        verifier = TeacherVerifier(student, layout, prompt_len, end, teacher)

    # The canvas: everything after the prompt is MASK. K + 1 extra positions, since drafts may overhang.
    tokens = F.pad(prompt, (0, length + K + 1), value=student.mask_id)
    position = torch.arange(tokens.size(1), device=device)
    tokens = tokens.masked_fill(position >= prompt_len[:, None], student.mask_id)
    accepted_in = torch.full_like(tokens, -1)
    u = F.pad(u, (0, 0, 0, K + 1))

    size = prompt_len                                            # (B,) length of the accepted text
    iteration = 0
    while (size < end).any():
        index = size[:, None] + offset                           # (B, K + 1) the next positions
        u_next = u[row, index]                                   # (B, K + 1, 3)
        p, q, drafts = verifier(tokens, size, size < end, u_next, sampling)
        index = index[:, :drafts.size(1)]                        # (B, A + 1)
        u_next = u_next[:, :drafts.size(1)]
        num_accepted, next_token = accept(p, q, drafts, u_next)  # (B,) each
        new_tokens = drafts.scatter(1, num_accepted[:, None], next_token[:, None])

        # Keep the accepted drafts and the token after them, up to the first end-of-text.
        last_new = (size + num_accepted)[:, None]
        is_new = (index <= last_new) & (index < end[:, None])    # (B, A + 1)
        is_eot = is_new & is_end(new_tokens, eot)
        eots_before = is_eot.cumsum(1) - is_eot.long()
        is_new = is_new & (eots_before == 0)
        tokens = tokens.scatter(1, index, torch.where(is_new, new_tokens, student.mask_id))
        accepted_in = accepted_in.scatter(1, index, torch.where(is_new, iteration, -1))

        size = (size + num_accepted + 1).minimum(end)
        size = torch.where(is_eot.any(1), end, size)
        iteration += 1

    tokens = tokens[:, :T]
    is_mask = tokens == student.mask_id                          # they remain only after the end of a text
    tokens = tokens.masked_fill(is_mask, padding_id(eot))
    forwards, positions = verifier.cost
    return SpeculativeText(tokens, accepted_in[:, :T], forwards, positions)


def accept(p: Tensor, q: Tensor, drafts: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafts are accepted (B,), and the token after them (B,).

    `p`, `q` (B, A + 1, V): the distributions of verifier and drafter; `drafts` (B, A + 1); `u` (B, A + 1, 3).
    At a position without a draft, such as the last one, q is 0 and the token is sampled from p.
    """
    p_draft = p.gather(2, drafts[..., None])[..., 0]             # (B, A + 1) probability of the draft
    q_draft = q.gather(2, drafts[..., None])[..., 0]
    is_accepted = u[..., ACCEPT] * q_draft < p_draft             # with probability min(1, p / q)
    is_accepted = is_accepted & (q_draft > 0)
    num_accepted = is_accepted.cumprod(1).sum(1)                 # (B,) before the first rejection, at most A

    row = torch.arange(len(p), device=p.device)
    p_next = p[row, num_accepted]                                # (B, V)
    q_next = q[row, num_accepted]
    residual = (p_next - q_next).clamp(min=0)
    has_residual = residual.sum(-1, keepdim=True) > 0            # False only if p = q, up to rounding
    residual = torch.where(has_residual, residual, p_next)
    return num_accepted, inverse_cdf(residual, u[row, num_accepted, RESAMPLE])


# 2. verifiers ----------------------------------------------------------------------------------------------
# Arguments of a call: tokens (B, T); `size` (B,), the length of the accepted text; `active` (B,), the rows
# that are not finished; u (B, K + 1, 3) of the positions from `size` on; the sampling. It returns p and q
# (B, A + 1, V) and drafts (B, A + 1) for the positions size .. size + A. The last of them has no draft.

class SelfVerifier:
    """The student verifies its own drafts: one forward pass per iteration."""

    def __init__(self, student, layout: Layout, prompt_len: Tensor, end: Tensor):
        if not layout.is_ar_model:
            raise ValueError("this student cannot verify its own drafts, since it does not read finished "
                             "text as an AR model does: convert it with --align=ar --context=causal, or use "
                             "its teacher as the verifier")
        block = layout.block if layout.block > 1 else 0          # a block of one position drafts nothing
        self.stream = DraftStream(student, block, prompt_len, end)
        self.last_size = None                                    # of the last iteration, with its output
        self.last_output = None

    def __call__(self, tokens: Tensor, size: Tensor, active: Tensor, u: Tensor,
                 sampling: Callable) -> tuple[Tensor, Tensor, Tensor]:
        if self.last_output is None:
            q = None
            drafts = tokens[:, :0]                               # no drafts before the first pass
        else:
            q = self.draft_probs(size, sampling)                 # (B, K - 1, V)
            drafts = sample_drafts(q, u)
            tokens = write_drafts(tokens, drafts, size)
        output = self.stream(tokens, size, drafts.size(1), active)
        self.last_size = size
        self.last_output = output
        p = to_probs(output.logits(output.verify_hidden), sampling)          # (B, A + 1, V)
        q = torch.zeros_like(p) if q is None else F.pad(q, (0, 0, 0, 1))
        return p, q, F.pad(drafts, (0, 1))

    def draft_probs(self, size: Tensor, sampling: Callable) -> Tensor:
        """(B, K - 1, V): q, from the block of masks that belongs to the number of accepted drafts."""
        hidden = self.last_output.draft_hidden                   # (B, A + 1, K - 1, C)
        num_accepted = size - self.last_size - 1
        num_accepted = num_accepted.clamp(0, hidden.size(1) - 1)     # out of range in finished rows
        row = torch.arange(len(size), device=size.device)
        logits = self.last_output.logits(hidden[row, num_accepted])
        return to_probs(logits, sampling)

    @property
    def cost(self) -> tuple[Tensor, Tensor]:
        """Forward passes and positions of each row, (B,) each."""
        return self.stream.forwards, self.stream.positions


class TeacherVerifier:
    """The student drafts and the teacher verifies: two forward passes per iteration."""

    def __init__(self, student, layout: Layout, prompt_len: Tensor, end: Tensor, teacher):
        self.layout = layout
        self.prompt_len = prompt_len
        self.end = end
        self.drafter = Denoiser(student, layout)
        self.drafter.reset(prompt_len, end)
        self.stream = DraftStream(teacher, 0, prompt_len, end)

    def __call__(self, tokens: Tensor, size: Tensor, active: Tensor, u: Tensor,
                 sampling: Callable) -> tuple[Tensor, Tensor, Tensor]:
        q = self.draft_probs(tokens, size, active, sampling)     # (B, K, V)
        drafts = sample_drafts(q, u)
        tokens = write_drafts(tokens, drafts, size)
        output = self.stream(tokens, size, self.layout.block, active)
        p = to_probs(output.logits(output.verify_hidden), sampling)          # (B, K + 1, V)
        return p, F.pad(q, (0, 0, 0, 1)), F.pad(drafts, (0, 1))

    def draft_probs(self, tokens: Tensor, size: Tensor, active: Tensor, sampling: Callable) -> Tensor:
        """(B, K, V): q of the positions size .. size + K - 1, 0 where nothing is drafted.

        With a causal context, a new block begins at `size`. With a context of blocks, which are counted from
        the end of the prompt, the student completes the block that `size` is in.
        """
        K = self.layout.block
        slot = torch.arange(K, device=size.device)
        filled = torch.zeros_like(size)                          # (B,) accepted tokens in the current block
        if self.layout.context_block > 1:
            filled = (size - self.prompt_len) % K * active
        start = size - filled                                    # (B,) where the current block begins
        position = start[:, None] + slot                         # (B, K)
        masked = (slot >= filled[:, None]) & (position < self.end[:, None])
        self.drafter.prompt_len = start                           # the denoiser counts blocks from here
        logits = self.drafter(tokens, start, masked)             # (B, K, V), from `start` on

        draft_slot = filled[:, None] + slot                      # (B, K) slots of size, size + 1, ...
        in_block = draft_slot < K
        index = draft_slot.clamp(max=K - 1)[..., None]
        logits = logits.gather(1, index.expand(-1, -1, logits.size(-1)))
        return to_probs(logits, sampling) * in_block[..., None]

    @property
    def cost(self) -> tuple[Tensor, Tensor]:
        """Forward passes and positions of each row, (B,) each."""
        forwards = self.drafter.forwards + self.stream.forwards
        positions = self.drafter.positions + self.stream.positions
        return forwards, positions


def to_probs(logits: Tensor, sampling: Callable) -> Tensor:
    """(B, A, V): the probabilities from which tokens are sampled, after temperature, top-k and top-p."""
    probs = logits.float().softmax(-1)
    return sampling(probs.flatten(0, 1)).view(logits.shape)


def sample_drafts(q: Tensor, u: Tensor) -> Tensor:
    """(B, A): one draft from each distribution of `q` (B, A, V)."""
    u_draft = u[:, :q.size(1), DRAFT]
    return inverse_cdf(q.flatten(0, 1), u_draft.flatten()).view(q.shape[:2])


def write_drafts(tokens: Tensor, drafts: Tensor, size: Tensor) -> Tensor:
    """`tokens` (B, T) with the `drafts` (B, A) at positions size .. size + A - 1."""
    offset = torch.arange(drafts.size(1), device=size.device)
    return tokens.scatter(1, size[:, None] + offset, drafts)


# 3. one forward pass over text, drafts and blocks of masks -------------------------------------------------

@dataclass
class DraftLayout:
    """The part of a forward pass that does not depend on tokens and lengths.

    Positions count from the end of the accepted text. The pass has W text positions, then M mask positions.
    """
    key: tuple              # (accepted tokens not in the cache, A); while it is the same, so is the layout
    position: Tensor        # (W + M,)
    is_mask: Tensor         # (W + M,) bool
    mask_slot: Tensor       # (W + M,) cache slot of a mask; negative for text
    last_visible: Tensor    # (W + M,) last text position that a query attends to
    sees_mask: Tensor       # (W + M, M) bool: which masks a query attends to
    read: Tensor            # flat indices into B * (W + M); per row A + 1 to verify, (A + 1)(K - 1) to draft

    @classmethod
    def of(cls, rows: int, num_uncached: int, num_drafts: int, block: int, device) -> "DraftLayout":
        """The last `num_uncached` accepted tokens, `num_drafts` (A) drafts, then A + 1 blocks of masks."""
        W = num_uncached + num_drafts
        text = torch.arange(-num_uncached, num_drafts, device=device)            # (W,) positions
        num_accepted = torch.arange(num_drafts + 1, device=device)           # one block of masks for each
        slot = torch.arange(block, device=device)
        masks = (num_accepted[:, None] + slot).flatten()                     # (M,) positions
        column = torch.arange(W + len(masks), device=device)

        # Text is causal. A mask attends to the text before its block, and to its block in both directions.
        before_block = num_accepted.repeat_interleave(block) - 1             # (M,)
        block_index = torch.arange(len(masks), device=device) // max(block, 1)
        same_block = block_index[:, None] == block_index                     # (M, M)
        text_sees_no_mask = same_block.new_zeros(W, len(masks))

        verify = num_uncached - 1 + num_accepted                 # (A + 1,) columns of x and the drafts
        draft = column[W:].view(num_drafts + 1, block)[:, :-1]   # columns of all masks but a block's last
        read = torch.cat([verify, draft.flatten()])
        first_column = torch.arange(rows, device=device)[:, None] * len(column)
        return cls(
            key=(num_uncached, num_drafts),
            position=torch.cat([text, masks]),
            is_mask=column >= W,
            mask_slot=column - W,
            last_visible=torch.cat([text, before_block]),
            sees_mask=torch.cat([text_sees_no_mask, same_block]),
            read=(first_column + read).flatten(),
        )


@dataclass
class StreamOutput:
    """Hidden states of one forward pass. Logits are made later, only of the blocks that are used."""
    verify_hidden: Tensor   # (B, A + 1, C) predict the tokens at size .. size + A
    draft_hidden: Tensor    # (B, A + 1, K - 1, C) at [:, a]: predict the tokens from size + a + 1 on
    output_layer: tuple     # its weight (V, C), and its bias if it has one

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, *self.output_layer)


class DraftStream:
    """A network and its KV cache: forward passes over accepted text, drafts, and blocks of masks.

    The keys and values of a rejected draft are overwritten by those of the token that replaces it. Those of
    the masks are used in their own pass only. `forwards` and `positions` (B,) count what each row has cost.
    """

    def __init__(self, net, block: int, prompt_len: Tensor, end: Tensor):
        """`block`: masks per block, 0 for none. `prompt_len`, `end` (B,): where each response begins and must
        stop."""
        self.net = net
        self.block = block
        self.end = end
        self.num_mask_slots = block * block                      # of the cache: masks first, then text
        self.cache = [Cache(self.num_mask_slots + int(end.max())) for _ in net.h]
        self.layout = None
        self.forwards = torch.zeros_like(prompt_len)
        self.positions = torch.zeros_like(prompt_len)

    def __call__(self, tokens: Tensor, size: Tensor, num_drafts: int, active: Tensor) -> StreamOutput:
        """One pass over the accepted text that is not in the cache, `num_drafts` (A) drafts, and the masks.

        `tokens` (B, T) holds the accepted text, of length `size` (B,), and the drafts. Rows that are not
        `active` (B,) cost nothing, and their hidden states are not valid.
        """
        B = len(size)
        K = self.block
        # The first pass reads the prompts. Later, accepted drafts are already in the cache, since they were
        # verified; only the token after them is new.
        num_uncached = int(size.max()) if self.layout is None else 1
        if self.layout is None or self.layout.key != (num_uncached, num_drafts):
            self.layout = DraftLayout.of(B, num_uncached, num_drafts, K, size.device)
        layout = self.layout

        position = size[:, None] + layout.position               # (B, W + M)
        used = (position >= 0) & (position < self.end[:, None])  # the others are padding
        used = used & active[:, None]
        cache_slot = torch.where(layout.is_mask, layout.mask_slot, self.num_mask_slots + position)
        dump = self.cache[0].slots                               # the cache's extra slot, for padding
        cache_index = self.cache[0].flat_index(torch.where(used, cache_slot, dump))
        position = torch.where(used, position, 0)
        inputs = tokens.gather(1, position)
        inputs = inputs.masked_fill(layout.is_mask, self.net.mask_id)
        mask = self.mask(size, used)
        hidden, output_layer = self.net(inputs, mask, position, layout.read, self.cache, cache_index,
                                        head=without_output_layer)
        self.forwards = self.forwards + active
        self.positions = self.positions + used.sum(1)

        hidden = hidden.view(B, -1, hidden.size(-1))             # (B, (A + 1) max(K, 1), C)
        verify_hidden = hidden[:, :num_drafts + 1]
        draft_hidden = hidden[:, num_drafts + 1:]
        draft_hidden = draft_hidden.reshape(B, num_drafts + 1, max(K - 1, 0), hidden.size(-1))
        return StreamOutput(verify_hidden, draft_hidden, output_layer)

    def mask(self, size: Tensor, used: Tensor) -> Tensor:
        """(B, 1, W + M, S): the attention mask. Keys are the cache slots, first of masks, then of text."""
        layout = self.layout
        M = layout.sees_mask.size(1)
        _, num_drafts = layout.key
        text_slots = self.cache[0].slots - self.num_mask_slots
        num_text = min(int(size.max()) + num_drafts, text_slots)     # text after it is not attended to
        text = torch.arange(num_text, device=size.device)
        last_visible = size[:, None] + layout.last_visible       # (B, W + M)
        last_visible = last_visible.clamp(min=0)                 # every query needs a key, padding too
        sees_text = text <= last_visible[..., None]              # (B, W + M, num_text)
        mask_used = used[:, used.size(1) - M:]                   # (B, M)
        sees_mask = layout.sees_mask & mask_used[:, None]        # (B, W + M, M)
        unused = sees_mask.new_zeros(*sees_mask.shape[:2], self.num_mask_slots - M)
        return torch.cat([sees_mask, unused, sees_text], 2)[:, None]

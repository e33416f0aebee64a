"""OPDLM: an autoregressive language model becomes a diffusion language model (arXiv 2606.06712), read downwards.

The student is the teacher's copy under another attention mask. It writes a text, one block of masks after the other
(1. rollout); of every block, one of the half-written states that it really visited is taken up again (2. states); the
frozen teacher, who reads the finished text, says what should stand under the masks (3. target); the student, who sees
the half-written block and the text before it, is moved there (4. loss, 5. step). With x0 the text, x_t the state, M its
masks and q the target:

    L = E[ mean over i in M of KL( q_i || p_student( . | x0 before the block, x_t ) ) ]

Letters: B rows, T positions, P prompt, R = T - P response, K block, V vocabulary, M masked slots, N places with a loss.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from model import masks, reveal
from model.denoiser import Denoiser
from model.draw import Warp, uniforms
from model.masks import Layout

# 1. rollout: a text, block by block, each block from all masks to none ------------------------------------------------

@dataclass
class Text:
    """Finished text and how it came about: a whole denoising trajectory is two integer tensors, tokens and order."""
    tokens: Tensor          # (B, T) prompt and response; behind the block of the first end-of-text, end-of-text
    order: Tensor           # (B, T) the step of its block, from 0, that revealed a slot; more: none did; -1: no slot
    kept: Tensor            # (B, T) bool: the response up to its first end-of-text, included
    forwards: Tensor        # (B,) passes of the network a row has paid for, prefill and commits included
    positions: Tensor       # (B,) positions pushed through it


@torch.no_grad()
def rollout(denoiser: Denoiser, prompt: Tensor, length: int, rule: reveal.Rule, u: Tensor, eot: int,
            warp: Warp = Warp(), prompt_len: Tensor | None = None) -> Text:
    """Write up to `length` tokens after each row of `prompt` (B, P), until an end-of-text.

    `u` (B, P + length, S): one uniform number a position (S = 1), or S of them, of which each step takes the next (the
    paper's redraws), and behind them what the rule rolls. `warp`: from probabilities to those that are drawn from.
    `prompt_len` (B,): where prompts end, if some are shorter than P; their responses follow at once.
    """
    (B, P), K, device = prompt.shape, denoiser.layout.block, prompt.device
    cap, draws, row = rule.steps(K), u.size(2) - rule.rolls, torch.arange(B, device=device)[:, None]
    start = torch.full((B,), P, device=device) if prompt_len is None else prompt_len   # (B,) where a row's block begins
    begin, end, step = start, start + length, torch.zeros_like(start)
    tokens = F.pad(prompt, (0, length + K), value=denoiser.mask_id)                 # + K: a block may hang over the end
    tokens = tokens.masked_fill(torch.arange(P + length + K, device=device) >= begin[:, None], denoiser.mask_id)
    order, slot, u = torch.full_like(tokens, -1), torch.arange(K, device=device), F.pad(u, (0, 0, 0, K))
    denoiser.open(begin, end)
    while (start < end).any():
        here = start[:, None] + slot                                             # (B, K) positions of each row's block
        block, inside = tokens.gather(1, here), here < end[:, None]
        masked = (block == denoiser.mask_id) & inside
        probs = denoiser(tokens, start, masked)[masked].float().softmax(-1)              # (M, V)
        number = u[row, here, step.clamp(max=draws - 1)[:, None]]                        # (B, K)
        drawn = warp.draw(probs, number[masked])                                         # (M,)
        sure = torch.zeros_like(number).masked_scatter(masked, rule.confidence(probs, drawn))
        show = rule(sure, masked, step, u[row, here]) | masked & (step == cap - 1)[:, None]  # the last takes the rest
        block = torch.where(show, block.masked_scatter(masked, drawn), block)
        tokens = tokens.scatter(1, here, block)
        order = order.scatter(1, here, torch.where(show, step[:, None], order.gather(1, here).masked_fill(masked, cap)))
        start, step = advance(masked & ~show, (block == eot) & inside, start, end, step)
    tokens = tokens[:, :-K].masked_fill(tokens[:, :-K] == denoiser.mask_id, eot)    # masks are left behind the end only
    return Text(tokens, order[:, :-K], kept(tokens, begin, end, eot), denoiser.forwards, denoiser.positions)


def advance(masked: Tensor, ends: Tensor, start: Tensor, end: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) twice: where each row's block begins now, and its step: the same block, the next, or once an end-of-text has
    no mask before it, the end. `masked` and `ends`, where an end-of-text is, (B, K) are of the block just worked on."""
    over, full = (ends & (masked.cumsum(1) == 0)).any(1), ~masked.any(1)
    start = torch.where(over, end, (start + masked.size(1) * full).minimum(end))
    return start, torch.where(full, 0, step + 1)


def kept(tokens: Tensor, begin: Tensor, end: Tensor, eot: int) -> Tensor:
    """(B, T): the response, begin <= position < end, up to its first end-of-text."""
    position = torch.arange(tokens.size(1), device=tokens.device)
    response = (position >= begin[:, None]) & (position < end[:, None])
    ends = (tokens == eot) & response
    return response & (ends.cumsum(1) - ends.long() == 0)


# The three texts to learn from. Each gets rows (B, T), tokens of training stories, of which the first P are the prompt.
def student_text(student, teacher, rows: Tensor, P: int, R: int, u: Tensor, recipe: "Recipe") -> Text:
    """The student's own: the paper's."""
    return rollout(Denoiser(student, recipe.layout), rows[:, :P], R, recipe.rule, u, recipe.eot)


def teacher_text(student, teacher, rows: Tensor, P: int, R: int, u: Tensor, recipe: "Recipe") -> Text:
    """The frozen AR model's."""
    return rollout(Denoiser(teacher, masks.AR), rows[:, :P], R, reveal.parse("static:1"), u, recipe.eot)


def data_text(student, teacher, rows: Tensor, P: int, R: int, u: Tensor, recipe: "Recipe") -> Text:
    """A story's. What follows its end is end-of-text; a model whose block is the whole text has to learn that too."""
    tokens, begin = rows[:, :P + R], torch.full((len(rows),), P, device=rows.device)
    keep, free = kept(tokens, begin, begin + R, recipe.eot), torch.zeros_like(begin)
    response = torch.arange(P + R, device=rows.device) >= P                              # (T,)
    tokens = torch.where(keep | ~response, tokens, recipe.eot)
    return Text(tokens, torch.full_like(tokens, -1), keep | response & (recipe.layout.block > R), free, free)


# 2. states: which slots of a finished text are masked again -----------------------------------------------------------
# Each takes order, kept (B, R) and u (B, R, 2) and gives masked (B, R); a block's own number is that of its first slot.

def in_blocks(x: Tensor, block: int, fill) -> Tensor:
    """(B, R, ...) -> (B, blocks, K, ...), the last block filled up."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.size(1) % block), value=fill).unflatten(1, (-1, block))


def out_of_blocks(x: Tensor, length: int) -> Tensor:
    """(B, blocks, K) -> (B, R)."""
    return x.flatten(1, 2)[:, :length]


def visited(order: Tensor, kept: Tensor, u: Tensor, block: int) -> Tensor:
    """One of the block's own states, uniformly over those that have a masked slot with a loss (paper section 4.2)."""
    step = in_blocks(order, block, -1)                                                   # (B, blocks, K)
    states = step.masked_fill(~in_blocks(kept, block, False), -1).amax(-1, keepdim=True) + 1
    k = (in_blocks(u, block, 0.0)[:, :, :1, 0] * states).long()                          # (B, blocks, 1)
    return out_of_blocks(step >= k, order.size(1))


def random(order: Tensor, kept: Tensor, u: Tensor, block: int) -> Tensor:
    """n random slots, n uniform over 1 .. K. Weighted by K / n this is, exactly and with less noise, masked diffusion's
    bound, which draws t uniformly, masks each slot with probability t and weights it by 1 / t."""
    real, number = in_blocks(torch.ones_like(kept), block, False), in_blocks(u, block, 0.0)
    n = 1 + (number[:, :, :1, 0] * real.sum(-1, keepdim=True)).long()                    # (B, blocks, 1)
    rank = number[..., 1].masked_fill(~real, 2.0).argsort(-1).argsort(-1)                # (B, blocks, K)
    return out_of_blocks(rank < n, order.size(1))


def prefix(order: Tensor, kept: Tensor, u: Tensor, block: int) -> Tensor:
    """All but a left part of the block, of any length that leaves a loss: nothing right of a mask is shown."""
    shown = in_blocks(u, block, 0.0)[:, :, :1, 0] * in_blocks(kept, block, False).sum(-1, keepdim=True)
    return out_of_blocks(torch.arange(block, device=order.device) >= shown.long(), order.size(1))


# 3. target: what should stand under the masks -------------------------------------------------------------------------

@torch.no_grad()
def teacher_probs(teacher, tokens: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """(N, V): one causal pass over the finished text; its logits at position i - 1 are about the token at i."""
    return teacher(tokens, read=rows * tokens.size(1) + at - 1).float().softmax(-1)


def one_hot(teacher, tokens: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """(N, V): the text itself."""
    return F.one_hot(tokens[rows, at], teacher.config.vocab).float()


# 4. loss --------------------------------------------------------------------------------------------------------------

def student_logits(student, tokens: Tensor, noisy: Tensor, P: int, layout: Layout, rows: Tensor, at: Tensor,
                   head: Callable = F.linear, ar_places: int = 0) -> Tensor:
    """(N, V): the logits about positions `at` of `rows`, in one pass over [clean text | noisy response].

    Logits about a slot stand `shift` before it: in the noisy stream if that is in its block, else in the clean one. The
    last `ar_places` of the N are all read in the clean one, where a causal student is an AR model.
    """
    T, device = tokens.size(1), tokens.device
    C = T if ar_places else T - 1 - (T - P - 1) % layout.block           # nobody looks at the last block's clean text
    position = torch.cat([torch.arange(C, device=device), torch.arange(P, T, device=device)])     # (C + R,)
    mask = masks.two_stream(T, P, layout, device, C)                                     # (C + R, C + R)
    source = at - layout.shift
    inside = masks.block_of(source, P, layout.block) == masks.block_of(at, P, layout.block)
    place = torch.where(inside & (torch.arange(len(at), device=device) < len(at) - ar_places), C + source - P, source)
    return student(torch.cat([tokens[:, :C], noisy], 1), mask, position, rows * len(position) + place, head=head)


def distill_loss(target: Tensor, logits: Tensor) -> Tensor:
    """(N,) nats: forward KL from `target` (N, V), probabilities, to the softmax of `logits` (N, V), in fp32."""
    return torch.xlogy(target, target).sum(-1) - (target * logits.float().log_softmax(-1)).sum(-1)


# Weights take masked, kept (B, R) and the block, and give (B, R), 0 where there is no loss.
def mean_of_masked(masked: Tensor, kept: Tensor, block: int) -> Tensor:
    """Each row is the mean over its places with a loss (paper)."""
    return parts((masked & kept).float())


def first_most(masked: Tensor, kept: Tensor, block: int) -> Tensor:
    """That mean, a block's first masked slot counting 8 times: the leftmost rule always draws there, and only there is
    all that the teacher has read visible to the student too."""
    nth = out_of_blocks(in_blocks(masked, block, False).cumsum(-1), masked.size(1))
    return parts((masked & kept) * torch.where(nth == 1, 8.0, 1.0))


def inverse_share(masked: Tensor, kept: Tensor, block: int) -> Tensor:
    """1 / t, t a block's masked share, per token of the row (BD3LM, SDAR): a bound on the text's nats."""
    count, size = (in_blocks(x, block, False).sum(-1, keepdim=True) for x in (masked, torch.ones_like(masked)))
    t = out_of_blocks((count / size).expand(-1, -1, block), masked.size(1))              # (B, R)
    return (masked & kept) / t.clamp(min=1e-6) / kept.sum(1, keepdim=True).clamp(min=1)


def parts(x: Tensor) -> Tensor:
    """(B, R), each row divided by its sum; a row of zeros stays."""
    return x / x.sum(1, keepdim=True).clamp(min=1)


# 5. step: one equation, and the dials that make the papers' methods of it ---------------------------------------------

TEXTS = {"student": student_text, "teacher": teacher_text, "data": data_text}
STATES = {"visited": visited, "random": random, "prefix": prefix}
TARGETS = {"teacher": teacher_probs, "onehot": one_hot}
WEIGHTS = {"mean": mean_of_masked, "first": first_most, "1/t": inverse_share}
METHODS = {                       # text x0, states x_t, target q, weight
    "opdlm": ("student", "visited", "teacher", "mean"),
    "opdlm-off": ("student", "random", "teacher", "mean"),
    "kd": ("teacher", "random", "teacher", "mean"),
    "sft": ("teacher", "random", "onehot", "mean"),
    "sdar": ("data", "random", "onehot", "1/t"),
}
ROLLOUT, STATE, PROMPT, DATA = 1, 2, 3, 4   # the streams of uniform numbers; 0 is the sampler's


@dataclass
class Recipe:
    """What a conversion is made of. The first four are the dials; their values are the functions above."""
    text: Callable
    states: Callable
    target: Callable
    weight: Callable
    layout: Layout
    eot: int                                    # id of end-of-text
    rule: reveal.Rule = reveal.parse("leftmost:0.98")
    batch: int = 16                             # rows of one update, over all processes
    share: Callable = lambda numbers: numbers   # those of a range of rows that are worked on in this process
    passes: int = 1                             # forwards and backwards, one after the other, that an update is made of
    updates: int = 1                            # updates per rollout (paper: 16)
    prompt: int = 16                            # longest prompt, tokens; a batch's is drawn from 1 .. this
    seed: int = 0
    clean_weight: float = 0.0                   # of the same loss once more, of the student as an AR model
    divergence: Callable = distill_loss         # from target to student, at each place
    head: Callable = F.linear                   # the student's last step; model/loss.py: all three without (N, V)
    show: Callable = repr                       # ids as text, for a debugger: p recipe.show(noisy[0])

    def __post_init__(self):
        if self.states is visited and self.text is not student_text:
            raise ValueError("states=visited needs text=student, as nobody denoised the others: take random or prefix")
        if self.clean_weight and (self.layout.clean_block, self.layout.shift) != (1, 1):
            raise ValueError("--clean_weight needs --align=ar --context=causal: else the student is no AR model")


def train_step(student, teacher, text: Text, P: int, u: Tensor, recipe: Recipe, optimizer) -> dict:
    """A forward and a backward on `text` (B, T), whose responses begin at P; `u` (B, T, 2) picks the states."""
    optimizer.zero_grad(set_to_none=True)                                 # here, to make room for the activations
    tokens, response = text.tokens, text.kept[:, P:]                                     # (B, T), (B, R)
    masked = recipe.states(text.order[:, P:], response, u[:, P:], recipe.layout.block)   # (B, R)
    noisy = tokens[:, P:].masked_fill(masked, student.mask_id)                           # (B, R) x_t
    loss_at, again = masked & response, response & bool(recipe.clean_weight)             # (B, R) twice
    rows, slots = torch.cat([loss_at.nonzero(), again.nonzero()]).unbind(1)              # (N,) twice
    target = recipe.target(teacher, tokens, rows, slots + P)                             # (N, V)
    logits = student_logits(student, tokens, noisy, P, recipe.layout, rows, slots + P, recipe.head, int(again.sum()))
    kl = recipe.divergence(target, logits)                                               # (N,)
    weight = recipe.weight(masked, response, recipe.layout.block)[loss_at]
    weight = torch.cat([weight, recipe.clean_weight * parts(again.float())[again]])      # (N,)
    loss = (kl * weight).sum() / recipe.batch
    loss.backward()
    optimizer.step()
    M, count = int(loss_at.sum()), int(response.sum())
    said = -target.gather(1, tokens[rows, slots + P][:, None])[:M].log().mean()      # nats of the text, where masked
    return {"loss": loss.item(), "kl": kl[:M].mean().item(), "text_nats": said.item(), "tokens": count,
            "places": len(rows), "masked": M / count, "len": count / len(tokens)}


def train(student, teacher, data: Callable, recipe: Recipe, optimizer, length: Callable, steps: range) -> Iterator:
    """Roll out, then update; yields each pass's record. `data(rows)` gives (B, T) tokens of training stories by their
    global row numbers, `length(step)` the longest response, tokens."""
    for first in range(steps.start, steps.stop, recipe.updates):
        rows = [recipe.share(range(step * recipe.batch, (step + 1) * recipe.batch))
                for step in range(first, min(first + recipe.updates, steps.stop))]       # of each update
        numbers, B = list(chain.from_iterable(rows)), len(rows[0]) // recipe.passes
        stories = data(numbers)                                                          # (B * updates, T)
        P = 1 + int(uniforms(recipe.seed, PROMPT, range(first, first + 1), (1,)) * recipe.prompt)
        R = min(length(first), stories.size(1) - P)
        S = recipe.rule.numbers(recipe.layout.block)
        draws = uniforms(recipe.seed, ROLLOUT, numbers, (P + R, S)).to(stories.device)
        text = recipe.text(student, teacher, stories, P, R, draws, recipe)
        picks = uniforms(recipe.seed, STATE, numbers, (P + R, 2)).to(stories.device)
        for i in range(len(rows) * recipe.passes):
            part = slice(i * B, (i + 1) * B)
            some = rows_of(text, part, P, recipe.layout.block)
            record = train_step(student, teacher, some, P, picks[part, :some.tokens.size(1)], recipe, optimizer)
            cost = {"forwards": int(some.forwards.sum()), "positions": int(some.positions.sum())}
            yield {"step": first + i // recipe.passes + 1, **record, **cost}


def rows_of(text: Text, part: slice, P: int, block: int) -> Text:
    """These rows, cut behind the block in which the longest of them ends."""
    R = int(text.kept[part, P:].sum(1).max())
    T = P + R + -R % block                                                               # slicing stops at the end
    return Text(*(x[part, :T] for x in (text.tokens, text.order, text.kept)), text.forwards[part], text.positions[part])

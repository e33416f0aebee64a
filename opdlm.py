"""OPDLM: turn an autoregressive (AR) language model into a diffusion language model (arXiv 2606.06712).

The student is a copy of the teacher under another attention mask. Training repeats five parts, in the order
of this file:

    1. rollout   the student writes a text block by block, each block from all masks to none
    2. state     every block is put back into one of the partially masked states that it passed through
    3. target    the frozen teacher reads the finished text: one distribution per masked position
    4. loss      the student reads the state and the text before the block: KL divergence from the target
    5. step      backward pass, optimizer step

With x0 the finished text, x_t the state, M its masked positions and q the target, the loss is

    L = E[ mean over i in M of KL( q_i || p_student( . | x0 before the block, x_t ) ) ]

The texts x0 are sampled at a temperature of choice: best at the one at which the student will decode.

Shapes: B rows, T positions, P prompt, R = T - P response, K block size, V vocabulary, M masked positions,
N positions in the loss, S random numbers per position.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig, is_end, padding_id, uniforms
from model import masks
from model.masks import Layout

# 1. rollout: generate a text block by block -------------------------------------------------------

@dataclass
class Rollout:
    """A finished text and its denoising trajectory, which two integer tensors hold: `tokens` and `order`."""
    tokens: Tensor          # (B, T) prompt and response, padded with end-of-text
    order: Tensor           # (B, T) step of its block that revealed a position; -1 where nothing was revealed
    response_mask: Tensor   # (B, T) bool: the response, up to and including its first end-of-text
    forwards: Tensor        # (B,) forward passes spent on a row, prefill and commits included
    positions: Tensor       # (B,) positions processed in these passes


class PlainDenoiser:
    """The simplest denoiser: every step is one forward pass over the whole text, without a cache.

    decoding/denoiser.py has its cached twin, with the same logits and less work.
    """

    def __init__(self, net, layout: Layout):
        self.net = net
        self.layout = layout
        self.mask_id = net.mask_id

    def reset(self, prompt_len: Tensor, end: Tensor) -> None:
        """Start new rows. `prompt_len`, `end` (B,): where each response begins and where it must stop."""
        self.prompt_len = prompt_len
        self.end = end
        self.forwards = torch.zeros_like(prompt_len)
        self.positions = torch.zeros_like(prompt_len)

    def __call__(self, tokens: Tensor, start: Tensor, masked: Tensor) -> Tensor:
        """(B, K, V) logits of positions start .. start + K - 1 of `tokens` (B, T), valid where `masked`."""
        T = int(self.end.max())
        B, K = masked.shape
        position = torch.arange(T, device=tokens.device).expand(B, T)
        in_block = position >= start[:, None]  # (B, T); positions after the block are never attended to
        mask = masks.sampler_mask(position, in_block, self.prompt_len, self.end, self.layout, T)
        logits = self.net(tokens[:, :T], mask, position).view(B, T, -1)

        active = masked.any(1)
        self.forwards = self.forwards + active
        self.positions = self.positions + active * T

        slot = torch.arange(K, device=tokens.device)
        source = start[:, None] + slot - self.layout.logit_shift  # (B, K) where a position's logits are read
        source = source.clamp(max=T - 1)[..., None]
        return logits.gather(1, source.expand(-1, -1, logits.size(-1)))


@torch.no_grad()
def rollout(denoiser: Denoiser | PlainDenoiser, prompt: Tensor, length: int, rule: reveal.Rule, u: Tensor,
            eot: int | tuple[int, ...], sampling: SamplingConfig = SamplingConfig(),
            prompt_len: Tensor | None = None) -> Rollout:
    """Generate up to `length` tokens after each row of `prompt` (B, P), until an end-of-text token.

    `rule` decides which masked positions are revealed at a step (decoding/reveal.py). `u` (B, P + length, S)
    holds uniform random numbers, S per position: those that sample its token (one, or one per step for rules
    that sample anew at each step), then those that the rule itself uses. `eot` is the end-of-text token, or
    all of them. `sampling` is temperature, top-k and top-p. `prompt_len` (B,) gives the lengths of prompts
    that differ.
    """
    B, P = prompt.shape
    K = denoiser.layout.block
    device = prompt.device
    max_steps = rule.steps(K)  # the last of them reveals all that is still masked
    num_samples = u.size(2) - rule.rolls  # random numbers per position that sample tokens
    row = torch.arange(B, device=device)[:, None]                # (B, 1) for indexing
    slot = torch.arange(K, device=device)                        # (K,) positions within a block
    if prompt_len is None:
        prompt_len = torch.full((B,), P, device=device)
    end = prompt_len + length                                    # (B,)

    # The canvas: everything after the prompt is MASK. K extra positions: the last block may overhang.
    tokens = F.pad(prompt, (0, length + K), value=denoiser.mask_id)
    position = torch.arange(tokens.size(1), device=device)
    tokens = tokens.masked_fill(position >= prompt_len[:, None], denoiser.mask_id)
    order = torch.full_like(tokens, -1)
    u = F.pad(u, (0, 0, 0, K))

    start = prompt_len  # (B,) where the current block of each row begins
    step = torch.zeros_like(start)  # (B,) denoising steps taken in this block
    denoiser.reset(prompt_len, end)
    while (start < end).any():
        index = start[:, None] + slot  # (B, K) absolute positions of the current block
        inside = index < end[:, None]
        block = tokens.gather(1, index)
        masked = (block == denoiser.mask_id) & inside

        # Predict and sample a token for every masked position.
        logits = denoiser(tokens, start, masked)                 # (B, K, V)
        probs = logits[masked].float().softmax(-1)               # (M, V)
        nth_sample = step.clamp(max=num_samples - 1)
        u_token = u[row, index, nth_sample[:, None]]             # (B, K)
        sampled = sampling.sample(probs, u_token[masked])        # (M,)

        # Choose which of them are revealed.
        confidence = torch.zeros_like(u_token)
        confidence[masked] = rule.confidence(probs, sampled)
        revealed = rule(confidence, masked, step, u[row, index])
        is_last_step = step == max_steps - 1
        revealed = revealed | (masked & is_last_step[:, None])

        # Write them, and note at which step.
        proposal = block.masked_scatter(masked, sampled)
        block = torch.where(revealed, proposal, block)
        tokens = tokens.scatter(1, index, block)
        block_order = order.gather(1, index)
        block_order = torch.where(masked, max_steps, block_order)  # max_steps: not revealed so far
        block_order = torch.where(revealed, step[:, None], block_order)
        order = order.scatter(1, index, block_order)

        # Go to the next block once no mask is left; stop once an end-of-text has no mask before it.
        still_masked = masked & ~revealed
        is_eot = is_end(block, eot) & inside
        no_mask_before = still_masked.cumsum(1) == 0
        text_done = (is_eot & no_mask_before).any(1)             # (B,)
        block_done = ~still_masked.any(1)
        start = torch.where(block_done, start + K, start).minimum(end)
        start = torch.where(text_done, end, start)
        step = torch.where(block_done, 0, step + 1)

    tokens = tokens[:, :-K]
    is_mask = tokens == denoiser.mask_id                         # they remain only after the end of a text
    tokens = tokens.masked_fill(is_mask, padding_id(eot))
    response_mask = find_response(tokens, prompt_len, end, eot)
    return Rollout(tokens, order[:, :-K], response_mask, denoiser.forwards, denoiser.positions)


def find_response(tokens: Tensor, prompt_len: Tensor, end: Tensor, eot: int | tuple[int, ...]) -> Tensor:
    """(B, T) bool: positions from prompt_len to end, up to and including the first end-of-text among them."""
    position = torch.arange(tokens.size(1), device=tokens.device)
    response = (position >= prompt_len[:, None]) & (position < end[:, None])
    is_eot = is_end(tokens, eot) & response
    eots_before = is_eot.cumsum(1) - is_eot.long()
    return response & (eots_before == 0)


# Four sources of text. Each takes `texts` (B, T), training texts whose first P tokens are the prompt.

def student_text(student, teacher, texts: Tensor, P: int, R: int, u: Tensor, recipe: "Recipe") -> Rollout:
    """Written by the student itself: on-policy, as in the paper."""
    denoiser = Denoiser(student, recipe.layout)
    return rollout(denoiser, texts[:, :P], R, recipe.rule, u, recipe.eot, recipe.sampling)


def student_ar_text(student, teacher, texts: Tensor, P: int, R: int, u: Tensor,
                    recipe: "Recipe") -> Rollout:
    """Written by the student as an AR model: on-policy for self-speculative decoding.

    That decoder writes the same text, several tokens at once (decoding/speculative.py). It drafts from one
    state, a block of masks; therefore `order` is 0 in the response, and each block has this one state.
    """
    denoiser = Denoiser(student, masks.AR)
    text = rollout(denoiser, texts[:, :P], R, reveal.parse("static:1"), u, recipe.eot, recipe.sampling)
    order = torch.where(text.response_mask, 0, -1)
    return replace(text, order=order)


def teacher_text(student, teacher, texts: Tensor, P: int, R: int, u: Tensor, recipe: "Recipe") -> Rollout:
    """Written by the frozen AR teacher, one token at a time."""
    denoiser = Denoiser(teacher, masks.AR)
    return rollout(denoiser, texts[:, :P], R, reveal.parse("static:1"), u, recipe.eot, recipe.sampling)


def data_text(student, teacher, texts: Tensor, P: int, R: int, u: Tensor, recipe: "Recipe") -> Rollout:
    """The training text, padded with end-of-text. Nothing was denoised, so `order` is -1 everywhere."""
    tokens = texts[:, :P + R]
    prompt_len = torch.full((len(texts),), P, device=texts.device)
    response_mask = find_response(tokens, prompt_len, prompt_len + R, recipe.eot)
    in_response = torch.arange(P + R, device=texts.device) >= P
    tokens = torch.where(in_response & ~response_mask, padding_id(recipe.eot), tokens)
    if recipe.layout.block > R:  # a full-sequence model also has to learn the padding
        response_mask = response_mask | in_response
    no_cost = torch.zeros_like(prompt_len)
    return Rollout(tokens, torch.full_like(tokens, -1), response_mask, no_cost, no_cost)


# 2. state: which positions of the finished text are masked again ----------------------------------
# Each function takes order, response_mask (B, R), u (B, R, 2) and the block size; it returns masked (B, R).

def split_blocks(x: Tensor, block: int, fill) -> Tensor:
    """(B, R, ...) -> (B, blocks, K, ...); the last block is padded with `fill`."""
    missing = -x.size(1) % block
    padding = (0, 0) * (x.dim() - 2) + (0, missing)  # F.pad starts with the last dimension
    return F.pad(x, padding, value=fill).unflatten(1, (-1, block))


def join_blocks(x: Tensor, length: int) -> Tensor:
    """(B, blocks, K) -> (B, R), without the padding."""
    return x.flatten(1, 2)[:, :length]


def per_block(u: Tensor, block: int) -> Tensor:
    """(B, blocks, 1): one random number per block, the first one of its first position."""
    return split_blocks(u, block, 0.0)[:, :, :1, 0]


def visited(order: Tensor, response_mask: Tensor, u: Tensor, block: int) -> Tensor:
    """One of the states that the block passed through, chosen uniformly (paper, section 4.2).

    State k of a block is what the student saw at denoising step k: all positions with order >= k are masked.
    Chosen are only states with at least one masked position in the response.
    """
    order_in_block = split_blocks(order, block, -1)                          # (B, blocks, K)
    in_response = split_blocks(response_mask, block, False)
    last_step = order_in_block.masked_fill(~in_response, -1).amax(-1, keepdim=True)
    num_states = last_step + 1                                               # (B, blocks, 1)
    k = (per_block(u, block) * num_states).long()
    return join_blocks(order_in_block >= k, order.size(1))


def random_mask(order: Tensor, response_mask: Tensor, u: Tensor, block: int) -> Tensor:
    """n random positions of each block, n uniform over 1 .. K.

    With loss weight K / n this is an unbiased estimate of the masked-diffusion bound, which draws t
    uniformly, masks each position with probability t and weights the loss by 1 / t; its variance is lower.
    """
    is_real = split_blocks(torch.ones_like(response_mask), block, False)     # False in the padding
    size = is_real.sum(-1, keepdim=True)
    n = 1 + (per_block(u, block) * size).long()                              # (B, blocks, 1)
    score = split_blocks(u, block, 0.0)[..., 1]                              # (B, blocks, K)
    score = score.masked_fill(~is_real, 2.0)  # above every random number: ranked last
    rank = score.argsort(-1).argsort(-1)
    return join_blocks(rank < n, order.size(1))


def prefix_shown(order: Tensor, response_mask: Tensor, u: Tensor, block: int) -> Tensor:
    """A random left part of each block is shown, the rest is masked: the states of left-to-right decoding."""
    num_response = split_blocks(response_mask, block, False).sum(-1, keepdim=True)
    num_shown = (per_block(u, block) * num_response).long()                  # (B, blocks, 1)
    slot = torch.arange(block, device=order.device)
    return join_blocks(slot >= num_shown, order.size(1))


def all_masked(order: Tensor, response_mask: Tensor, u: Tensor, block: int) -> Tensor:
    """Every position: the state from which a block begins, and from which speculative decoding drafts."""
    return torch.ones_like(response_mask)


# 3. target: the distribution that the student should have at a masked position --------------------
# Each function takes the finished tokens (B, T) and N positions as (rows, position); it returns (N, V).

@torch.no_grad()
def teacher_probs(teacher, tokens: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    """The teacher's distributions, from one causal pass over the finished text.

    An AR model's logits at position i - 1 predict the token at position i.
    """
    read = rows * tokens.size(1) + position - 1                  # (N,) flat indices into B * T
    return teacher(tokens, read=read).float().softmax(-1)


def one_hot(teacher, tokens: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    """All probability on the token of the text: the loss becomes cross-entropy."""
    return F.one_hot(tokens[rows, position], teacher.config.vocab).float()


# 4. loss ------------------------------------------------------------------------------------------

def student_logits(student, tokens: Tensor, noisy: Tensor, P: int, layout: Layout, rows: Tensor,
                   position: Tensor, head: Callable = F.linear) -> Tensor:
    """(N, V) logits of N positions, given as (rows, position): one pass over [clean text | noisy response].

    `tokens` (B, T) is the finished text, `noisy` (B, R) the response with its masks. A noisy block attends to
    itself and to the clean text before it, which is what the sampler saw (model/masks.py, training_mask).
    """
    T = tokens.size(1)
    K = layout.block
    device = tokens.device
    last_block = (T - P - 1) % K + 1
    C = T - last_block  # no block attends to the clean text of the last one
    clean_position = torch.arange(C, device=device)
    noisy_position = torch.arange(P, T, device=device)
    both = torch.cat([clean_position, noisy_position])           # (C + R,)
    mask = masks.training_mask(T, P, layout, device, C)          # (C + R, C + R)

    # Logits are read `logit_shift` before their position: in the noisy stream if that is in the same block,
    # else in the clean stream.
    source = position - layout.logit_shift
    same_block = masks.block_of(source, P, K) == masks.block_of(position, P, K)
    column = torch.where(same_block, C + source - P, source)     # (N,) index into C + R
    read = rows * (C + len(noisy_position)) + column
    return student(torch.cat([tokens[:, :C], noisy], 1), mask, both, read, head=head)


def distill_loss(target: Tensor, logits: Tensor) -> Tensor:
    """(N,) nats: forward KL from `target` (N, V), probabilities, to the softmax of `logits` (N, V)."""
    log_probs = logits.float().log_softmax(-1)
    negative_entropy = torch.xlogy(target, target).sum(-1)
    cross_entropy = -(target * log_probs).sum(-1)
    return negative_entropy + cross_entropy


# Loss weights. Each function takes masked and response_mask (B, R) and the block size, and returns (B, R).

def mean_of_masked(masked: Tensor, response_mask: Tensor, block: int) -> Tensor:
    """The mean over a row's masked positions, as in the paper."""
    return normalize_rows((masked & response_mask).float())


def first_masked_x8(masked: Tensor, response_mask: Tensor, block: int) -> Tensor:
    """That mean, with the first masked position of every block counted 8 times.

    A left-to-right rule always reveals that position, and only there do student and teacher see the same
    context.
    """
    masked_so_far = split_blocks(masked, block, False).cumsum(-1)
    nth = join_blocks(masked_so_far, masked.size(1))  # (B, R) 1 at the first masked position of a block
    count = torch.where(nth == 1, 8.0, 1.0)
    return normalize_rows((masked & response_mask) * count)


def inverse_t(masked: Tensor, response_mask: Tensor, block: int) -> Tensor:
    """1 / t per response token, t the masked share of the block (BD3LM, SDAR): a bound on the text's NLL."""
    num_masked = split_blocks(masked, block, False).sum(-1, keepdim=True)    # (B, blocks, 1)
    size = split_blocks(torch.ones_like(masked), block, False).sum(-1, keepdim=True)
    t = (num_masked / size).expand(-1, -1, block)
    t = join_blocks(t, masked.size(1)).clamp(min=1e-6)                       # (B, R)
    num_tokens = response_mask.sum(1, keepdim=True).clamp(min=1)
    return (masked & response_mask) / t / num_tokens


def normalize_rows(x: Tensor) -> Tensor:
    """(B, R): each row divided by its sum; a row of zeros stays zero."""
    return x / x.sum(1, keepdim=True).clamp(min=1)


def clean_loss(student, teacher, tokens: Tensor, response_mask: Tensor, P: int,
               recipe: "Recipe") -> tuple[Tensor, int]:
    """The student's loss as an AR model, from a plain causal pass: the mean over each row, summed over rows.

    It keeps the student a good AR model, which self-speculative decoding relies on. The second value is the
    number of positions in the loss.
    """
    rows, slots = response_mask.nonzero(as_tuple=True)
    position = slots + P
    read = rows * tokens.size(1) + position - 1
    target = recipe.target(teacher, tokens, rows, position)                  # (N, V)
    causal = masks.context_mask(tokens.size(1), P, 1, tokens.device)         # block 1: the AR model's mask
    logits = student(tokens, causal, read=read, head=recipe.head)
    weight = normalize_rows(response_mask.float())[response_mask]
    loss = (recipe.divergence(target, logits) * weight).sum()
    return loss, len(rows)


# 5. step: one equation; its dials give the methods of several papers ------------------------------

SOURCES = {
    "student": student_text,
    "student-ar": student_ar_text,
    "teacher": teacher_text,
    "data": data_text,
}
STATES = {"visited": visited, "random": random_mask, "prefix": prefix_shown, "all": all_masked}
TARGETS = {"teacher": teacher_probs, "onehot": one_hot}
WEIGHTS = {"mean": mean_of_masked, "first": first_masked_x8, "1/t": inverse_t}
METHODS = {                       # source of x0, states x_t, target q, weight
    "opdlm": ("student", "visited", "teacher", "mean"),
    "opdlm-off": ("student", "random", "teacher", "mean"),
    "kd": ("teacher", "random", "teacher", "mean"),
    "sft": ("teacher", "random", "onehot", "mean"),
    "sdar": ("data", "random", "onehot", "1/t"),
}
ROLLOUT, STATE, PROMPT, DATA = 1, 2, 3, 4  # streams of random numbers; stream 0 belongs to the sampler


@dataclass
class Recipe:
    """The configuration of a conversion. The first four fields, the dials, are functions of this file."""
    source: Callable                            # who writes the text x0
    states: Callable                            # which positions are masked again
    target: Callable
    weight: Callable
    layout: Layout
    eot: int | tuple[int, ...]                  # id of the end-of-text token, or of all of them
    rule: reveal.Rule = reveal.parse("leftmost:0.98")   # the reveal rule of rollouts
    sampling: SamplingConfig = SamplingConfig()         # temperature, top-k and top-p of rollouts
    sampled_target: bool = False                # targets after temperature, top-k and top-p
    batch: int = 16                             # rows per update, summed over all processes
    shard_rows: Callable = lambda rows: rows  # the part of a range of rows that this process works on
    grad_accum: int = 1                         # gradient accumulation steps per update
    updates_per_rollout: int = 1                # (paper: 16)
    max_prompt: int = 16  # prompt lengths are uniform over 1 .. max_prompt tokens
    seed: int = 0
    clean_weight: float = 0.0                   # weight of clean_loss
    clean_source: Callable | None = None        # whose text clean_loss reads; None: the text of the update
    divergence: Callable = distill_loss         # from target to student, per position
    head: Callable = F.linear  # the student's output layer; training/chunked_kl.py has a lean one
    logits: Callable = student_logits  # model/lora.py has a faster twin for a student that is an adapter
    show: Callable = repr  # token ids as text, for a debugger: p recipe.show(noisy[0])

    def __post_init__(self):
        if self.states is visited and self.source in (teacher_text, data_text):
            raise ValueError("states=visited needs source=student: only the student's rollouts have "
                             "denoising states; use states=random, states=prefix or states=all")
        if self.source is student_ar_text and not self.layout.is_ar_model:
            raise ValueError("--source=student-ar needs --align=ar --context=causal: otherwise the student "
                             "is not an AR model; use --source=student")
        if self.clean_weight and not self.layout.is_ar_model:
            raise ValueError("--clean_weight needs --align=ar --context=causal: otherwise the student is not "
                             "an AR model")
        if self.clean_source and not self.clean_weight:
            raise ValueError("--clean_text=data is the text of the loss of --clean_weight: give that too "
                             "(e.g. --clean_weight=0.5)")


def train_step(student, teacher, text: Rollout, P: int, u: Tensor, recipe: Recipe, optimizer,
               clean_text: Rollout | None = None) -> dict:
    """One forward and backward pass on a text whose response begins at P; `u` (B, T, 2) picks the states.

    clean_loss reads `clean_text`; without it, the same text.
    """
    optimizer.zero_grad(set_to_none=True)  # at the beginning, to free memory for the activations
    tokens = text.tokens                                                     # (B, T)
    response_mask = text.response_mask[:, P:]                                # (B, R)
    masked = recipe.states(text.order[:, P:], response_mask, u[:, P:], recipe.layout.block)
    noisy = tokens[:, P:].masked_fill(masked, student.mask_id)               # (B, R) x_t

    in_loss = masked & response_mask                                         # (B, R)
    rows, slots = in_loss.nonzero(as_tuple=True)                             # (N,) each
    position = slots + P
    target = recipe.target(teacher, tokens, rows, position)                  # (N, V)
    text_probs = target.gather(1, tokens[rows, position][:, None])           # (N, 1) of the text's tokens
    if recipe.sampled_target:
        target = recipe.sampling(target)
    logits = recipe.logits(student, tokens, noisy, P, recipe.layout, rows, position, recipe.head)
    kl = recipe.divergence(target, logits)                                   # (N,)
    weight = recipe.weight(masked, response_mask, recipe.layout.block)[in_loss]
    loss = (kl * weight).sum()
    num_clean = 0
    if recipe.clean_weight:
        clean_text = clean_text or text
        clean_response = clean_text.response_mask[:, P:]
        clean, num_clean = clean_loss(student, teacher, clean_text.tokens, clean_response, P, recipe)
        loss = loss + recipe.clean_weight * clean
    loss = loss / recipe.batch
    loss.backward()
    optimizer.step()

    num_tokens = int(response_mask.sum())
    return {
        "loss": loss.item(),
        "kl": kl.mean().item() if len(rows) else 0.0,  # there may be no masked position in the response
        "text_nats": -text_probs.log().mean().item() if len(rows) else 0.0,
        "tokens": num_tokens,
        "loss_positions": len(rows) + num_clean,
        "masked": len(rows) / max(num_tokens, 1),
        "len": num_tokens / len(tokens),
    }


def train(student, teacher, data: Callable, recipe: Recipe, optimizer, length: Callable,
          steps: range) -> Iterator[dict]:
    """Roll out, then update, for the updates `steps`. Yields one record per forward and backward pass.

    `data(rows)` returns the tokens (B, T) of the training texts with these global row numbers; `length(step)`
    is the longest response in tokens.
    """
    K = recipe.layout.block
    for first in range(steps.start, steps.stop, recipe.updates_per_rollout):
        updates = range(first, min(first + recipe.updates_per_rollout, steps.stop))
        row_ids = []
        for step in updates:                                     # every update has rows of its own
            row_ids += recipe.shard_rows(range(step * recipe.batch, (step + 1) * recipe.batch))
        texts = data(row_ids)                                                # (B * updates, T)

        u_prompt = uniforms(recipe.seed, PROMPT, range(first, first + 1), (1,))
        P = 1 + int(u_prompt * recipe.max_prompt)                # one prompt length per rollout
        R = min(length(first), texts.size(1) - P)
        S = recipe.rule.numbers(K)
        u_rollout = uniforms(recipe.seed, ROLLOUT, row_ids, (P + R, S)).to(texts.device)
        u_state = uniforms(recipe.seed, STATE, row_ids, (P + R, 2)).to(texts.device)
        text = recipe.source(student, teacher, texts, P, R, u_rollout, recipe)
        clean_text = text
        if recipe.clean_source:
            clean_text = recipe.clean_source(student, teacher, texts, P, R, u_rollout, recipe)

        num_passes = len(updates) * recipe.grad_accum
        B = len(row_ids) // num_passes
        for i in range(num_passes):
            part = slice(i * B, (i + 1) * B)
            batch = take_rows(text, part, P, K)
            u_batch = u_state[part, :batch.tokens.size(1)]
            clean_batch = take_rows(clean_text, part, P, K)
            record = train_step(student, teacher, batch, P, u_batch, recipe, optimizer, clean_batch)
            record["step"] = first + i // recipe.grad_accum + 1
            record["forwards"] = int(batch.forwards.sum())
            record["positions"] = int(batch.positions.sum())
            yield record


def take_rows(text: Rollout, part: slice, P: int, block: int) -> Rollout:
    """These rows, cut after the block in which the longest of them ends."""
    longest = max(1, int(text.response_mask[part, P:].sum(1).max()))
    T = P + longest + -longest % block  # may exceed the text: slicing stops at its end
    return Rollout(
        tokens=text.tokens[part, :T],
        order=text.order[part, :T],
        response_mask=text.response_mask[part, :T],
        forwards=text.forwards[part],
        positions=text.positions[part],
    )

"""Laws of lesson 4: a KV cache for block diffusion, and a reveal rule."""
from itertools import product

import torch
from torch import Tensor

from course.given import CachedModel, decode, tiny_net
from course.laws.common import close, require, require_shape, show
from decoding import reveal
from decoding.sampling import SamplingConfig
from model.masks import Layout
from opdlm import PlainDenoiser, rollout

WRITE = ("threshold", "block_logits")
NO_END = 99                 # an end-of-text token that the tiny networks never write
# P, K and the length of the response, the smallest first.
SIZES = ((1, 1, 2), (2, 2, 4), (3, 3, 6), (3, 4, 6))


# What the laws need -------------------------------------------------------------------------------

def blocks() -> list[tuple[Tensor, Tensor]]:
    """Confidences and masks, (1, K) each, with K from 1 to 4: every mask. The last case has many rows."""
    cases = []
    for K in (1, 2, 3, 4):
        confidence = torch.rand(1, K, generator=torch.Generator().manual_seed(K))
        for bits in product((False, True), repeat=K):
            cases.append((confidence, torch.tensor([bits])))
    confidences, masks = zip(*cases[-2 ** 4:])
    cases.append((torch.cat(confidences), torch.cat(masks)))
    return cases


def revealed_by(mine, level: float, confidence: Tensor, masked: Tensor) -> Tensor:
    revealed = mine.threshold(level, confidence.clone(), masked.clone())
    require_shape(revealed, tuple(masked.shape), torch.bool, "threshold")
    return revealed


def layouts(K: int) -> list[Layout]:
    """Three students: this project's, the paper's, and one that shares a choice with each."""
    return [Layout(K, 1, 1), Layout(K, 1, 0), Layout(K, K, 0)]


def random_text(T: int) -> Tensor:
    """(T,) tokens of a vocabulary of 5."""
    return torch.randint(5, (T,), generator=torch.Generator().manual_seed(0))


def states_of(text: Tensor, start: int, end: int, mask_id: int):
    """The states of the block start .. end - 1, revealed from the right: its text, and masks after it."""
    for shown in range(end - start):
        state = text.clone()
        state[start:end - shown] = mask_id
        state[end:] = mask_id
        yield state


def without_cache(net, layout: Layout, P: int, state: Tensor, start: int, end: int) -> Tensor:
    """(W, V) the logits of the block, by a forward pass over the whole text: opdlm.PlainDenoiser."""
    sampler = PlainDenoiser(net, layout)
    sampler.reset(torch.tensor([P]), torch.tensor([len(state)]))
    masked = torch.ones(1, layout.block, dtype=torch.bool)
    return sampler(state[None], torch.tensor([start]), masked)[0, :end - start]


def compare(mine, blocks_of_text: slice, states: slice, hint: str) -> None:
    """Cached and uncached logits while a text is revealed: some of its blocks, some of their states."""
    for P, K, length in SIZES:
        for layout in layouts(K):
            net = tiny_net()
            T = P + length
            text = random_text(T)
            model = CachedModel(net, layout, P, T)
            starts = range(P, T, K)
            for start in starts:
                end = min(start + K, T)
                all_states = list(states_of(text, start, end, net.mask_id))
                for n, state in enumerate(all_states):
                    logits = mine.block_logits(model, state.clone(), start)
                    if start not in starts[blocks_of_text] or n not in range(len(all_states))[states]:
                        continue
                    require_shape(logits, (end - start, 5), None, "block_logits")
                    exact = without_cache(net, layout, P, state, start, end)
                    place = f"P = {P}, {layout}, end = {T}: call {n + 1} of the block at {start}"
                    require(close(logits, exact), f"{place}: the cached logits differ from the uncached by "
                            f"{(logits - exact).abs().max():.4f}", hint)


# The laws of the rule -----------------------------------------------------------------------------

def only_masks(mine):
    """Only masked positions are revealed."""
    for level in (0.0, 0.5, 1.0):
        for confidence, masked in blocks():
            revealed = revealed_by(mine, level, confidence, masked)
            require(not (revealed & ~masked).any(), f"level {level}, confidence {show(confidence)}, masked "
                    f"{show(masked)}: revealed {show(revealed)}", "a visible position has a confidence too")


def progress(mine):
    """Each row that has a mask reveals at least one position, so K steps finish a block."""
    for level in (0.0, 0.5, 1.0):
        for confidence, masked in blocks():
            revealed = revealed_by(mine, level, confidence, masked)
            stuck = masked.any(1) & ~revealed.any(1)             # (B,)
            row = int(stuck.long().argmax())
            require(not stuck.any(), f"level {level}, confidence {show(confidence)}, masked {show(masked)}: "
                    f"nothing is revealed in row {row}",
                    "a sampler would wait for ever" if len(masked) == 1 else "each row stands for itself")


def one_per_step(mine):
    """At level 1, one position is revealed: the most confident of the masked ones."""
    for confidence, masked in blocks()[:-1]:
        revealed = revealed_by(mine, 1.0, confidence, masked)
        expected = [c for c, m in zip(confidence[0], masked[0]) if m]
        found = confidence[0][revealed[0]].tolist()
        exact = [max(expected).item()] if expected else []
        require(found == exact, f"level 1, confidence {show(confidence[0])}, masked {show(masked[0])}: "
                f"revealed {show(revealed[0])}", "most confident among which positions?")


def above_the_level(mine):
    """Every masked position above the level is revealed; one below it only if there is none above."""
    for level in (0.0, 0.3, 0.5, 0.8):
        for confidence, masked in blocks():
            revealed = revealed_by(mine, level, confidence, masked)
            for row in range(len(masked)):
                for k in range(masked.size(1)):
                    above = masked[row] & (confidence[row] > level)
                    wrong = above[k] & ~revealed[row, k]
                    wrong |= revealed[row, k] & ~above[k] & above.any()
                    require(not wrong, f"level {level}, confidence {show(confidence[row])}, masked "
                            f"{show(masked[row])}: revealed {show(revealed[row])}, wrong at position {k}",
                            "the level alone decides, if any masked position is above it")


# The laws of the cache ----------------------------------------------------------------------------

def first_call(mine):
    """In the first call, with an empty cache, cached logits equal uncached logits."""
    for P, K, length in SIZES[:3]:
        for layout in layouts(K):
            net = tiny_net()
            state = torch.cat([random_text(P), torch.full((length,), net.mask_id)])
            logits = mine.block_logits(CachedModel(net, layout, P, P + length), state.clone(), P)
            require_shape(logits, (K, 5), None, "block_logits")
            exact = without_cache(net, layout, P, state, P, P + K)
            require(close(logits, exact), f"P = {P}, {layout}: the first call differs from the uncached "
                    f"logits by {(logits - exact).abs().max():.4f}",
                    "an empty cache knows nothing of the prompt; and which logits predict token i?")


def same_block(mine):
    """In all later calls for the same block, cached logits equal uncached logits."""
    hint = "the prompt is in the cache now; did this call process every position whose logits it reads?"
    compare(mine, slice(0, 1), slice(1, None), hint)


def next_block(mine):
    """In the next blocks, cached logits equal uncached logits."""
    hint = "what does the cache hold of the block before: keys and values of which tokens?"
    compare(mine, slice(1, None), slice(None), hint)


def cost(mine):
    """A call is one forward pass, over the finished text that the cache lacks, the block, and no more."""
    for P, K, length in SIZES:
        for layout in layouts(K):
            net = tiny_net()
            T = P + length
            text = random_text(T)
            model = CachedModel(net, layout, P, T)
            known = 0                                            # finished text in the cache
            for start in range(P, T, K):
                end = min(start + K, T)
                for n, state in enumerate(states_of(text, start, end, net.mask_id)):
                    before = model.positions
                    mine.block_logits(model, state, start)
                    allowed = end - min(known, start - layout.logit_shift)
                    known = start
                    spent = model.positions - before
                    require(spent <= allowed, f"P = {P}, {layout}, end = {T}: call {n + 1} of the block at "
                            f"{start} processed {spent} positions, {allowed} are enough",
                            "correct, but this is what a cache is to save")
            calls = length
            require(model.forwards == calls, f"P = {P}, {layout}: {calls} calls made {model.forwards} passes",
                    "one call of model.forward is enough")


def text_is_the_same(mine):
    """Your two functions decode the text of the project's sampler, in as many forward passes."""
    for P, K, length in SIZES:
        for layout, level in product(layouts(K), (0.0, 0.4, 1.0)):
            net = tiny_net()
            prompt = random_text(P)
            model = CachedModel(net, layout, P, P + length)

            def rule(confidence: Tensor, masked: Tensor, level: float = level) -> Tensor:
                return mine.threshold(level, confidence, masked)

            tokens = decode(model, prompt, rule, mine.block_logits)
            u = torch.zeros(1, P + length, 1)
            same_rule = reveal.parse(f"threshold:{level}")
            exact = rollout(PlainDenoiser(net, layout), prompt[None], length, same_rule, u, NO_END,
                            SamplingConfig(temperature=0))
            same = torch.equal(tokens, exact.tokens[0]) and model.forwards == exact.forwards.item()
            require(same, f"P = {P}, {layout}, threshold {level}: {show(tokens)} in {model.forwards} passes, "
                    f"the sampler's text is {show(exact.tokens[0])} in {exact.forwards.item()}",
                    "both functions obey their own laws; print the block after each step")


LAWS = [only_masks, progress, one_per_step, above_the_level, first_call, same_block, next_block, cost,
        text_is_the_same]

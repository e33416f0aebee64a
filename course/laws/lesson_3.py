"""Laws of lesson 3: the mask of a training pass with two streams, and the columns where logits are read."""
from itertools import product

import torch
from torch import Tensor

from course.given import tiny_net, two_stream_logits
from course.laws.common import close, require, require_shape, show
from model.masks import AR, Layout
from opdlm import PlainDenoiser

WRITE = ("training_mask", "source_column")
# T, P, K with the smallest first. In the first ones P is a multiple of K, so it does not matter where the
# counting of the blocks begins.
SIZES = ((2, 1, 1), (4, 2, 2), (3, 1, 1), (3, 1, 2), (5, 1, 2), (6, 2, 3), (7, 3, 2), (9, 2, 4))
HINTS = {
    ("clean", "clean"): "clean text attends in blocks of layout.context_block, counted from the prompt's end",
    ("clean", "noisy"): "the clean text never sees the noisy response",
    ("noisy", "clean"): "a noisy block sees the clean text of all blocks before it, the prompt too",
    ("noisy", "noisy"): "positions of one noisy block see each other, both ways, and no other noisy block",
}


# What the laws need -------------------------------------------------------------------------------

def layouts(K: int) -> list[Layout]:
    """The student of this project, and that of the paper."""
    return [Layout(K, 1, 1), Layout(K, K, 0)]


def mask_of(mine, T: int, P: int, layout: Layout) -> Tensor:
    mask = mine.training_mask(T, P, layout)
    require_shape(mask, (2 * T - P, 2 * T - P), torch.bool, "training_mask")
    return mask


def column(c: int, T: int, P: int) -> tuple[str, int]:
    """The stream and the position of a column."""
    return ("clean", c) if c < T else ("noisy", P + c - T)


def random_text(T: int, seed: int) -> Tensor:
    """(1, T) tokens of a vocabulary of 5."""
    return torch.randint(5, (1, T), generator=torch.Generator().manual_seed(seed))


# The laws -----------------------------------------------------------------------------------------

def clean_sees_no_noise(mine):
    """The clean text never sees the noisy response: it does not depend on what is masked."""
    for T, P, K in SIZES:
        for layout in layouts(K):
            mask = mask_of(mine, T, P, layout)
            seen = mask[:T, T:].nonzero()
            if len(seen):
                query, r = seen[0].tolist()
                require(False, f"T = {T}, P = {P}, {layout}: clean position {query} sees noisy position "
                        f"{P + r}", "rows are queries and columns are keys; which part is the top right?")


def answer_is_hidden(mine):
    """A noisy position never sees the clean copy of its own block, nor of a later one."""
    for T, P, K in SIZES:
        mask = mask_of(mine, T, P, Layout(K))
        for i, j in product(range(P, T), range(T)):
            is_answer = (j - P) // K >= (i - P) // K
            if P % K:
                hint = "for P = 2 and K = 2 it works; look where block 0 begins, and where the prompt ends"
            else:
                hint = "the model could copy the answer from there"
            require(not (is_answer and mask[T + i - P, j]), f"T = {T}, P = {P}, K = {K}: noisy position {i} "
                    f"sees the clean token at {j}", hint)


def later_blocks_do_not_matter(mine):
    """Changing the text of a block changes no logit of the blocks before it, in either stream."""
    net = tiny_net()
    for T, P, K in ((3, 1, 1), (5, 1, 2), (7, 3, 2)):
        for layout in layouts(K):
            mask = mask_of(mine, T, P, layout)
            position = torch.tensor([column(c, T, P)[1] for c in range(2 * T - P)])
            text = random_text(T, 0)[0]
            last = (T - 1 - P) // K * K + P                      # where the last block begins
            other = torch.where(torch.arange(T) >= last, (text + 1) % 5, text)
            before = net(text[position][None], mask, position)
            after = net(other[position][None], mask, position)
            same = torch.tensor([close(a, b) for a, b in zip(before, after)])
            wrong = (~same & (position < last)).nonzero()
            if len(wrong):
                stream, at = column(int(wrong[0]), T, P)
                require(False, f"T = {T}, P = {P}, {layout}: other tokens from position {last} on changed "
                        f"the logits of the {stream} column at position {at}",
                        "follow the information: which key lets this query see the last block?")


def mask_is_a_loop(mine):
    """The mask says of every layout, query and key what the rule says of them."""
    for T, P, K in SIZES:
        for layout in layouts(K):
            mask = mask_of(mine, T, P, layout)
            for q, k in product(range(2 * T - P), repeat=2):
                query_stream, i = column(q, T, P)
                key_stream, j = column(k, T, P)
                context = layout.context_block
                allowed = {
                    ("clean", "clean"): (j - P) // context <= (i - P) // context,
                    ("clean", "noisy"): False,
                    ("noisy", "clean"): (j - P) // K < (i - P) // K,
                    ("noisy", "noisy"): (j - P) // K == (i - P) // K,
                }[query_stream, key_stream]
                verb = "sees" if mask[q, k] else "does not see"
                require(bool(mask[q, k]) == allowed, f"T = {T}, P = {P}, {layout}: {query_stream} position "
                        f"{i} {verb} {key_stream} position {j}", HINTS[query_stream, key_stream])


def block_one_is_the_ar_model(mine):
    """With block size 1, the logits of every response token are those of the AR model."""
    net = tiny_net()
    for T, P in ((2, 1), (3, 1), (6, 2)):
        tokens = random_text(T, 0)
        columns = mine.source_column(torch.arange(P, T), T, P, AR)
        require_shape(columns, (T - P,), torch.long, "source_column")
        logits = two_stream_logits(net, tokens, torch.ones(1, T - P).bool(), AR, mine.training_mask,
                                   mine.source_column)
        exact = net(tokens)[P - 1:T - 1]                         # causal; logits at i - 1 predict token i
        if torch.equal(columns, torch.arange(T, 2 * T - P)):
            hint = "these are the columns of the tokens themselves; in an AR model, logits at i - 1 predict i"
        else:
            hint = "with block size 1, position i - 1 is always of another block than i: in which stream?"
        require(close(logits[0], exact), f"T = {T}, P = {P}, {AR}: the logits of positions "
                f"{list(range(P, T))} are read in the columns {show(columns)} and differ from the AR model's",
                hint)


def student_sees_what_the_sampler_sees(mine):
    """The logits of a block in a state are those of the sampler that has finished the blocks before it."""
    net = tiny_net()
    for T, P, K in ((3, 1, 2), (5, 1, 2), (6, 2, 3), (9, 2, 4)):
        for layout in layouts(K):
            tokens = random_text(T, 1)
            masked = torch.rand(1, T - P, generator=torch.Generator().manual_seed(2)) < 0.6
            masked[0, 0] = True
            logits = two_stream_logits(net, tokens, masked, layout, mine.training_mask, mine.source_column)
            sampler = PlainDenoiser(net, layout)
            sampler.reset(torch.tensor([P]), torch.tensor([T]))
            for start in range(P, T, K):
                end = min(start + K, T)
                in_block = masked[:, start - P:end - P]
                state = torch.nn.functional.pad(tokens, (0, K), value=net.mask_id)
                state[:, start:end].masked_fill_(in_block, net.mask_id)
                state[:, end:] = net.mask_id                     # not written yet
                slots = torch.zeros(1, K, dtype=torch.bool)
                slots[:, :end - start] = True
                exact = sampler(state, torch.tensor([start]), slots)[0, :end - start]
                mine_block = logits[0, start - P:end - P]
                for i in range(end - start):
                    require(close(mine_block[i], exact[i]), f"T = {T}, P = {P}, {layout}, masked response "
                            f"{show(masked[0])}: the logits of position {start + i} are not the sampler's",
                            "while it denoises a block, the sampler does not know its masked tokens, and the "
                            "clean stream does; which stream saw what the sampler sees?")


LAWS = [clean_sees_no_noise, answer_is_hidden, later_blocks_do_not_matter, mask_is_a_loop,
        block_one_is_the_ar_model, student_sees_what_the_sampler_sees]

"""Laws of lesson 5: the exact likelihood of a block-diffusion model, and generative perplexity."""
import math

import torch
from torch import Tensor

from course import given
from course.laws.common import close, require, require_shape, show
from model import masks
from model.masks import Layout
from opdlm import PlainDenoiser

WRITE = ("story_nats", "gen_nats")
SIZES = ((2, 1), (2, 2), (3, 2), (2, 3), (3, 3), (2, 4), (2, 5))     # V, R: the smallest first


# What the laws need -------------------------------------------------------------------------------

def texts_after_first(V: int, R: int) -> Tensor:
    """(V ** R, 1 + R): the token 0, then every text of R tokens."""
    texts = given.all_texts(V, R)
    first = torch.zeros(len(texts), 1, dtype=torch.long)
    return torch.cat([first, texts], 1)


def nats_of(mine, net, tokens: Tensor, layout: Layout) -> Tensor:
    nats = mine.story_nats(net, tokens, layout)
    require_shape(nats, (len(tokens),), None, "story_nats")
    return nats.double()


def mean_nats(mine, judge, tokens: Tensor, response_mask: Tensor) -> Tensor:
    nats = mine.gen_nats(judge, tokens, response_mask)
    require_shape(nats, (), None, "gen_nats")
    return nats.double()


def ar_nats(net, tokens: Tensor) -> Tensor:
    """(B, R) nats of each token after the first, from one causal pass."""
    log_probs = net(tokens).view(*tokens.shape, -1).log_softmax(-1)
    return -log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]


def sampler_nats(net, tokens: Tensor, layout: Layout) -> Tensor:
    """(B,) -log of the probability that the sampler writes each text, if it reveals one token at a time."""
    B, T = tokens.shape
    K = layout.block
    denoiser = PlainDenoiser(net, layout)
    denoiser.reset(torch.full((B,), 1), torch.full((B,), T))
    canvas = torch.full((B, T + K), net.mask_id)
    canvas[:, 0] = tokens[:, 0]
    nats = torch.zeros(B, dtype=torch.float64)
    for i in range(1, T):
        start = i - (i - 1) % K
        masked = torch.arange(start, start + K) >= i
        logits = denoiser(canvas, torch.full((B,), start), masked.expand(B, -1))         # (B, K, V)
        log_probs = logits[:, i - start].log_softmax(-1)
        nats -= log_probs.gather(1, tokens[:, i, None])[:, 0]
        canvas[:, i] = tokens[:, i]
    return nats


# The laws -----------------------------------------------------------------------------------------

def block_one_is_ar(mine):
    """With block size 1 the nats are those of the AR model."""
    for V, R in SIZES:
        net = given.tiny_net(V)
        tokens = texts_after_first(V, R)
        mine_nats = nats_of(mine, net, tokens, masks.AR)
        exact = ar_nats(net, tokens).sum(1)
        for text, value, ar in zip(tokens, mine_nats, exact):
            require(close(value, ar), f"V = {V}, text {show(text)}: your {value:.4f} nats, the AR model's "
                    f"{ar:.4f}",
                    "with block size 1 each block is one mask; the nats are a sum over tokens, the first "
                    "token is context only; is column i - 1 of `noisy` position i of `tokens`?")


def sums_to_one(mine):
    """The probabilities of all texts of a length sum to 1, whatever the model and the block size."""
    for V, R in SIZES:
        net = given.tiny_net(V)
        tokens = texts_after_first(V, R)
        for K in range(1, R + 2):
            total = nats_of(mine, net, tokens, Layout(K)).neg().exp().sum()
            if close(total, total.round()):
                hint = "two texts that differ in one token only have the same nats: is every token scored?"
            else:
                hint = ("which tokens at position i, or to the right of it, does the model see when it "
                        "predicts i?")
            require(close(total, 1), f"V = {V}, R = {R}, block size {K}: the probabilities of the "
                    f"{len(tokens)} texts sum to {total:.4f}", hint)


def same_as_sampler(mine):
    """The nats of a text are -log of the probability that the sampler writes it, one token after another."""
    for V, R in SIZES[1:]:
        net = given.tiny_net(V)
        tokens = texts_after_first(V, R)
        for layout in (Layout(2), Layout(3), Layout(4), Layout(2, 2, 0), Layout(3, 3, 0)):
            exact = sampler_nats(net, tokens, layout)
            for text, value, sampled in zip(tokens, nats_of(mine, net, tokens, layout), exact):
                require(close(value, sampled), f"V = {V}, block size {layout.block}, text {show(text)}: your "
                        f"{value:.4f} nats, the sampler's {sampled:.4f}",
                        "it sums to 1, but it is the likelihood of another sampler: when slot j is "
                        "predicted, what has this sampler revealed already?")


def agrees_with_chain(mine):
    """gen_nats of whole texts is the AR model's chain rule, divided by the number of generated tokens."""
    for V, R in SIZES:
        net = given.tiny_net(V)
        for text in texts_after_first(V, R):
            tokens = text[None]
            response_mask = torch.arange(R + 1)[None] > 0
            value = mean_nats(mine, net, tokens, response_mask)
            exact = ar_nats(net, tokens).sum() / R
            if close(value * (R + 1), exact * R):
                hint = "divide by the number of generated tokens; the prompt's are not generated"
            elif close(value, exact * R):
                hint = "this is the sum over the text; texts of different lengths need a number per token"
            else:
                hint = "which row of the logits predicts the token at position i?"
            require(close(value, exact), f"V = {V}, text {show(text)}: your {value:.4f} nats per token, the "
                    f"chain rule's {exact:.4f}", hint)


def context_is_free(mine):
    """Only generated tokens count: the mean over a prompt's tokens and its answer's is that of the parts."""
    net = given.tiny_net(3)
    for R in (2, 3, 4):
        tokens = texts_after_first(3, R)[-2:]
        everything = torch.arange(R + 1).expand(2, -1) > 0
        for P in range(2, R + 1):
            response = torch.arange(R + 1).expand(2, -1) >= P
            prompt = everything & ~response
            whole = mean_nats(mine, net, tokens, everything) * R
            parts = mean_nats(mine, net, tokens, response) * (R + 1 - P)
            parts = parts + mean_nats(mine, net, tokens, prompt) * (P - 1)
            require(close(whole, parts), f"R = {R}, prompt of {P} tokens: whole texts have {whole:.4f} nats, "
                    f"prompt and response together {parts:.4f}",
                    "where response_mask is False, a token is read but not counted, neither above nor below "
                    "the fraction bar")


def every_token_counts_once(mine):
    """The mean is over tokens, not over texts: a short text weighs less than a long one."""
    net = given.tiny_net(3)
    tokens = torch.tensor([[0, 1, 1, 1], [0, 2, 0, 0]])
    response_mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]]).bool()
    value = mean_nats(mine, net, tokens, response_mask)
    exact = ar_nats(net, tokens)[response_mask[:, 1:]]
    mean_of_texts = (exact[:3].mean() + exact[3]) / 2
    hint = "divide the sum of all nats by the number of all generated tokens"
    require(not close(value, mean_of_texts), f"responses of 3 tokens and of 1 token: your {value:.4f} is the "
            "mean of the two texts' means", hint)
    require(close(value, exact.mean()), "responses of 3 tokens and of 1 token, their nats "
            f"{show(exact)}: your mean is {value:.4f}", hint)


def repetition_looks_good(mine):
    """Under the shipped AR model, one letter without end has a lower perplexity than a good story."""
    net, _, tok = given.pretrained()
    story = given.encode(tok)
    silly = torch.full_like(story, tok.encode("r")[0])
    silly[:, 0] = tok.bos
    response_mask = torch.ones_like(story, dtype=torch.bool)
    response_mask[:, 0] = False
    good = math.exp(mean_nats(mine, net, story, response_mask))
    bad = math.exp(mean_nats(mine, net, silly, response_mask))
    require(bad < good, f"\"rrr...\" has perplexity {bad:.2f}, the story {good:.2f}",
            "a lower perplexity is a text that the judge finds more likely; look at the sign")


LAWS = [block_one_is_ar, sums_to_one, same_as_sampler, agrees_with_chain, context_is_free,
        every_token_counts_once, repetition_looks_good]

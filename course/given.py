"""What the exercises are given: the shipped model, tiny random networks, and small joints.

A joint is the probability of every text of R tokens from a vocabulary of V: a tensor of V ** R numbers. So
all that a language model approximates can be computed exactly.

Shapes: B rows, R positions, V vocabulary, N = V ** R texts.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data import tokenizer
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import uniforms
from model import checkpoint
from model.gpt import GPT, Cache, GPTConfig
from model.masks import Layout, sampler_mask
from opdlm import rollout
from sample import PRETRAINED

TEXT = ("Once upon a time, there was a little girl named Lily. She had a big red ball. One day, she went to "
        "the park with her mom. Lily saw a small dog. The dog was sad, because he had no ball.")


def pretrained():
    """(network, layout, tokenizer) of the shipped student: 1.8M parameters, trained on TinyStories."""
    net, layout = checkpoint.load(PRETRAINED)
    return net.eval().requires_grad_(False), layout, tokenizer.load(PRETRAINED)


def encode(tok, text: str = TEXT) -> Tensor:
    """(1, T) token ids of a text. A text begins with the token `bos`, as in training."""
    return torch.tensor([[tok.bos, *tok.encode(text)]])


def tiny_net(vocab: int = 5, context: int = 16, seed: int = 0) -> GPT:
    """A random network in float64 whose every weight matters."""
    generator = torch.Generator().manual_seed(seed)
    net = GPT(GPTConfig(vocab, context, layers=2, heads=2, width=8)).double().init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net.eval().requires_grad_(False)


def all_texts(V: int, R: int) -> Tensor:
    """(N, R): every text of R tokens, in the order of a flattened joint."""
    return torch.cartesian_prod(*[torch.arange(V)] * R).view(-1, R)


def all_states(R: int) -> Tensor:
    """(2 ** R - 1, R) bool: every state with at least one mask, those with few masks first."""
    states = all_texts(2, R).bool()[1:]
    return states[states.sum(-1).argsort(stable=True)]


def state_probs(masked: Tensor) -> Tensor:
    """(B,) the probability of each state: 1 / R for the number n of masks, then one of the sets of n."""
    R = masked.size(-1)
    sets = [R * math.comb(R, int(n)) for n in masked.sum(-1)]
    return 1 / torch.tensor(sets, dtype=torch.float64)


def random_joint(V: int, R: int, seed: int = 0) -> Tensor:
    """(V, ..., V) probabilities of every text of R tokens, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn([V] * R, generator=generator, dtype=torch.float64)
    return logits.flatten().softmax(0).view(logits.shape)


def conditionals(joint: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    """(B, R, V) probabilities: at each position, the exact distribution given the visible tokens of its row.

    `tokens` (B, R); `masked` (B, R) bool. Tokens under a mask are not read. At a visible position, all
    probability is on its token. It is what a perfect masked diffusion model would predict. If the joint
    gives the visible tokens probability 0, so that there is no such distribution, it is uniform.
    """
    V = joint.size(0)
    R = joint.dim()
    texts = all_texts(V, R)                                                  # (N, R)
    agrees = (texts == tokens[:, None]) | masked[:, None]                    # (B, N, R)
    weight = agrees.all(-1) * joint.flatten()                                # (B, N)
    is_token = F.one_hot(texts, V).to(joint)                                 # (N, R, V)
    total = torch.einsum("bn,nrv->brv", weight, is_token)                    # (B, R, V)
    evidence = weight.sum(-1)[:, None, None]                                 # (B, 1, 1)
    return torch.where(evidence > 0, total / evidence.clamp(min=1e-300), 1 / V)


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """(B,) tokens from distributions `probs` (B, V), which sum to 1, with random numbers `u` (B,).

    Token v is drawn if u lies between the sum of the probabilities before v and the sum including v. Unlike
    decoding.sampling.inverse_cdf, it does not divide by the sum.
    """
    cdf = probs.cumsum(-1)
    token = (cdf <= u[:, None]).sum(-1)
    return token.clamp(max=probs.size(-1) - 1)


@torch.no_grad()
def stories(net, layout, tok, rule: reveal.Rule, n: int = 32,
            length: int = 48) -> tuple[float, float, list[str]]:
    """`n` stories of up to `length` tokens, written under a reveal rule by the network.

    Returns the nats per token of the stories, as the same network reads them as an AR model (how unlikely
    they are), the tokens per forward pass, and the stories.
    """
    prompt = encode(tok, "Once upon a time").expand(n, -1)
    P = prompt.size(1)
    u = uniforms(0, 0, range(n), (P + length, rule.numbers(layout.block)))
    text = rollout(Denoiser(net, layout), prompt, length, rule, u, tok.ends)
    log_probs = net(text.tokens).log_softmax(-1).view(*text.tokens.shape, -1)    # causal by default
    following = text.tokens[:, 1:, None]
    nats = -log_probs[:, :-1].gather(-1, following)[..., 0]                  # (n, T - 1)
    written = text.response_mask[:, 1:]
    speed = written.sum() / text.forwards.sum()
    texts = [tok.decode(row[P:][keep[P:]].tolist()) for row, keep in zip(text.tokens, text.response_mask)]
    return nats[written].mean().item(), speed.item(), texts


def two_stream_logits(net, tokens: Tensor, masked: Tensor, layout: Layout, training_mask: Callable,
                      source_column: Callable) -> Tensor:
    """(B, R, V) logits of the response tokens, from one pass over [clean text | noisy response].

    `tokens` (B, T) is the finished text, `masked` (B, R) says which tokens of the response are masked. The
    mask and the columns where logits are read come from the functions of lesson 3.
    """
    B, T = tokens.shape
    P = T - masked.size(1)
    noisy = tokens[:, P:].masked_fill(masked, net.mask_id)
    both = torch.cat([tokens, noisy], 1)                                     # (B, T + R)
    clean_position = torch.arange(T)
    position = torch.cat([clean_position, clean_position[P:]])               # (T + R,)
    logits = net(both, training_mask(T, P, layout), position)
    logits = logits.view(*both.shape, -1)
    return logits[:, source_column(clean_position[P:], T, P, layout)]


class CachedModel:
    """A network that generates one row of text, with a KV cache: slot i is for the position i.

    `written` is for its user to keep: positions 0 .. written - 1 are in the cache as finished text.
    """

    def __init__(self, net, layout: Layout, prompt_len: int, end: int):
        self.net = net
        self.layout = layout
        self.prompt_len = prompt_len
        self.end = end                  # where the response must stop: later positions do not exist
        self.cache = [Cache(end) for _ in net.h]
        self.written = 0
        self.forwards = 0               # what it has cost so far: forward passes,
        self.positions = 0              # and positions processed in them

    @torch.no_grad()
    def forward(self, tokens: Tensor, first: int, last: int, start: int) -> Tensor:
        """(last - first, V) logits of the positions first .. last - 1 of `tokens` (T,): one forward pass.

        The positions from `start` on are the block that is being denoised; those before it are finished text.
        Keys and values of all these positions are written to the cache, over what was there. Positions before
        `first` are not processed: attention reads what the cache has of them.
        """
        self.forwards += 1
        self.positions += last - first
        position = torch.arange(first, last)[None]                           # (1, W)
        mask = sampler_mask(position, position >= start, torch.tensor([self.prompt_len]),
                            torch.tensor([self.end]), self.layout, last)
        index = self.cache[0].flat_index(position)
        return self.net(tokens[None, first:last], mask, position, cache=self.cache, cache_index=index)


def decode(model: CachedModel, prompt: Tensor, rule: Callable, block_logits: Callable) -> Tensor:
    """(end,) the prompt (P,) and a response, block by block; each position gets its most likely token.

    `block_logits(model, tokens, start)` gives the logits of a block, `rule(confidence, masked)` says which
    masked positions are revealed. Both are functions of lesson 4.
    """
    K = model.layout.block
    tokens = F.pad(prompt, (0, model.end - len(prompt)), value=model.net.mask_id)
    for start in range(len(prompt), model.end, K):
        block = tokens[start:start + K]                                      # the same memory as `tokens`
        for _ in range(K):
            masked = block == model.net.mask_id
            if not masked.any():
                break
            probs = block_logits(model, tokens, start).softmax(-1)
            confidence, best = probs.max(-1)
            revealed = rule(confidence[None], masked[None])[0]
            block[revealed & masked] = best[revealed & masked]
    return tokens

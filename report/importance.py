"""Where a light model costs something: nats against a heavy one, by the share t of a text that is masked.

Both are models of whole texts, which see the first token and denoise the rest, R tokens. In a state with n of them
masked, t = n / R, a masked token costs the light model on average

    CE(t) = mean of log p_heavy(x_i) - log p_light(x_i)         by the story's own tokens: the ground truth, but noisy
    KL(t) = mean of KL(p_heavy || p_light)                      if the heavy model were right, the same number

The mean of CE over n = 1 .. R is the gap of the two models' bounds per token; each of T ancestral steps reveals R / T
tokens on average, so what the light steps of a schedule cost, to first order, is the sum of KL at their t (see
model/schedule.py, arXiv 2604.02340).
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import opdlm
from decoding.sampling import uniforms
from model.masks import Layout
from report import metrics


def whole(stories: list[Tensor], length: int, eot: int) -> Tensor:
    """(stories, length): each to its end, and end-of-text behind it, which such a model has learnt to write."""
    tokens = metrics.padded([story[:length] for story in stories], eot)
    return F.pad(tokens, (0, length - tokens.size(1)), value=eot)


@torch.no_grad()
def said(net, tokens: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """(M, V) log-probabilities at the masked slots of the responses, (B, R), and the M rows they are in."""
    rows, slots = masked.nonzero(as_tuple=True)
    noisy = tokens[:, 1:].masked_fill(masked, net.mask_id)
    layout = Layout(tokens.size(1), tokens.size(1), 0)
    return opdlm.student_logits(net, tokens, noisy, 1, layout, rows, slots + 1).float().log_softmax(-1), rows


def states(rows: range, R: int, stretch: tuple[float, float], seed: int) -> Tensor:
    """Masked (B, R): n of the slots, any of them alike, n / R uniform in a stretch of (0, 1]."""
    u, low, high = uniforms(seed, 0, rows, (R + 1,)), *stretch
    n = 1 + (R * (low + (high - low) * u[:, :1])).long()
    return u[:, 1:].argsort(1).argsort(1) < n.clamp(max=R)


def costs(heavy, light, tokens: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) twice: CE and KL of each text, the mean over its masked tokens, in float64."""
    (p, rows), (q, _) = said(heavy, tokens, masked), said(light, tokens, masked)
    true = tokens[:, 1:][masked][:, None]                                               # (M, 1)
    each = (p - q).gather(1, true)[:, 0], (p.exp() * (p - q)).sum(1)
    sums = (torch.zeros(len(tokens), dtype=torch.float64).index_add(0, rows, x.double()) for x in each)
    return tuple(x / masked.sum(1) for x in sums)


def curves(heavy, light, stories: list[Tensor], length: int, eot: int, stretches: int = 20, seed: int = 0,
           batch: int = 64) -> dict:
    """CE and KL at the middles t of equal stretches of (0, 1], and last at t = 1, where a text begins; each over all
    stories, with standard errors."""
    tokens, found = whole(stories, length, eot), {"t": [], "ce": [], "ce_error": [], "kl": [], "kl_error": []}
    for k in range(stretches + 1):
        parts, stretch = [], (min(k, stretches) / stretches, min(k + 1, stretches) / stretches)
        for i in range(0, len(tokens), batch):
            some = tokens[i:i + batch]
            numbers = range(k * len(tokens) + i, k * len(tokens) + i + len(some))
            masked = states(numbers, length - 1, stretch, seed)
            parts.append(costs(heavy, light, some, masked))
        found["t"].append(sum(stretch) / 2)
        for name, each in zip(("ce", "kl"), map(torch.cat, zip(*parts))):
            found[name].append(each.mean().item())
            found[f"{name}_error"].append(each.std().item() / math.sqrt(len(each)))
    return found


def gap(heavy, light, stories: list[Tensor], length: int, eot: int, draws: int, seed: int, batch: int = 64) -> dict:
    """How far the light model's bound lies above the heavy one's, nats per token: each story in `draws` states, n
    uniform over 1 .. R. With its standard error; another seed than the curves' makes it a number of its own."""
    tokens, parts = whole(stories, length, eot), []
    for k in range(draws):
        for i in range(0, len(tokens), batch):
            some, first = tokens[i:i + batch], k * len(tokens) + i
            masked = states(range(first, first + len(some)), length - 1, (0.0, 1.0), seed)
            parts.append(costs(heavy, light, some, masked)[0])
    each = torch.cat(parts)
    return {"nats": each.mean().item(), "error": each.std().item() / math.sqrt(len(each))}
